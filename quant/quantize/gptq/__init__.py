"""Quantising with feedback: what rounding one weight breaks, the weights that are rounded later mend.

ggml rounds the weights of a row one superblock at a time, and knows of the inputs only how large each is. Inputs of a
model are alike, though: an error in one column can be undone by others that say nearly the same. How alike they are is
told by the second moments of the inputs over a calibration text, and with these the levels, then the scales, of ggml's
own superblocks are chosen so that what comes out of the matrix is nearest to what it was. The file keeps its types and
its size, and every program that reads GGUF reads it; only its bytes are not llama-quantize's, and as they come out of
products of large matrices, another kind of processor may choose another level here and there.
"""

REVISION = 1
"""Raised whenever other bytes come out; what was made by another one is not used again."""
