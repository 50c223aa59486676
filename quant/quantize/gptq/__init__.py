"""GPTQ for ggml's block formats: each weight's rounding error is compensated by later weights.

ggml rounds one superblock at a time and weights errors by the imatrix, which is the diagonal of the
Hessian H = E[x xᵀ] of a matrix's inputs x. GPTQ (arXiv:2210.17323) uses all of H: where the inputs
of two columns are correlated, the error of one column is undone by the other. Types and sizes stay
the same and every GGUF reader reads the file. Only the bytes are not llama-quantize's.

```
layouts      which bits of a block hold the scales, levels and signs of each type; pure
formats      stored rows unpacked into scales and levels, and packed again; pure
rounding     nearest levels and nearest codebook vectors; pure
hessian      the Hessian of one matrix: damping, act-order, Cholesky factor, loss; pure
descent      the algorithm: GPTQ, then coordinate descent over levels and scales; pure
compensator  what the engine calls: it looks up the Hessian of a tensor and its expert
```

Other packages call :class:`~quant.quantize.gptq.compensator.ErrorCompensator` and read
:data:`REVISION`. The Hessians are computed by :mod:`quant.calibration.hessians`.

Bytes come out of products of large matrices. On another kind of processor BLAS adds in another
order, and a level here and there differs. A change that changes bytes must raise ``REVISION``.
"""

REVISION = 1
"""Number of the algorithm: raised when its bytes change, so that older results are not reused."""
