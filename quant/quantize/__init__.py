"""Quantizing: one pass over the weights of a base writes every variant, with ggml's own bytes.

```
variants    the pass (write_variants), and the quantize stage of a build (quantize_variants)
standalone  the same outside of a build (quantize_model): what `quant quantize` calls
shard       VariantFile, one variant as it is published; llama-gguf-split, verified by tensor
engine/     the pass itself: layout, threads, journal, resuming after a kill
kernels/    ggml's quantizers on vector units (C++ in native/), each tried against ggml first
gptq/       error compensation: levels and scales chosen with the Hessian instead of the imatrix
```

Other packages call the functions of ``variants``, ``standalone`` and ``shard``, pass `VariantFile`
on, and use ``gptq.REVISION`` in the keys of stored work. `quant.evaluate` also measures the error
of types with the engine's readers, the kernels and GPTQ.

What must stay: a variant's bytes are those of llama-quantize, byte for byte
(tests/quant/quantize/engine/test_oracle.py), unless GPTQ is on. The keys of stored work and of the
record NAME.gguf.json are read by later versions. Free to change: threads, memory, the journal's
format (its magic number), and everything about speed.
"""
