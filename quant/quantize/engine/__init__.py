"""One pass over the weights of a base writes every variant, with ggml's bytes.

```
layout    where every byte of every file lies, headers included; pure
chunks    the work: rows of one expert, and their order; pure
weights   the rows of the base, and the importance of their columns
sample    the quantization error of a chunk, measured on some rows
journal   which chunks of a file are written, whatever ends the run
output    a variant's files, from full length to final name
reuse     tensors that a finished file has already
job       what a run does, as JSON, and what can be wrong with it
status    which tensors are in work, for the error after a crash
work      the threads that do it
worker    the process that the threads run in, because ggml may abort it
run       the public function: starts that process and returns the records
```

Other packages call :func:`quant.quantize.variants.write_variants`, which calls ``run``. A run that
was killed is continued by the same call. At most the chunks that were in work are done again.
"""
