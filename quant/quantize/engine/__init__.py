"""One pass over the weights of a BF16 file writes every variant, with ggml's own kernels and llama-quantize's bytes.

```
layout    where every byte of every file will lie, head included; pure
chunks    the work: rows of one expert, in which order; pure
weights   the rows of the BF16 file, and the importance of their columns
journal   which chunks of a file are written, whatever ends the run
output    a file that is being written, from its full length to its final name
reuse     tensors that a finished file has already
work      the threads that do it
worker    the process that the threads are in, since ggml may end it
run       the public verb: starts that process, and says what it came to
```

A run that is killed is continued by the same call; at most the chunks that were in work are done again.
"""
