"""What an error in a matrix does to what the model says next, by gradients through the whole model.

The divergence of a model that lost a little in one matrix is, to second order, half of Σ (gᵀ e x)² over the tokens: x goes
into the matrix, e is what it lost, and g is how the logarithm of a word's likelihood moves with what comes out, the word being
drawn from what the model itself says (the Fisher information; Martens, 2020, arXiv:1412.1193). So tokens do not count alike:
each counts by |g|², as in GuidedQuant (Kim et al., 2025, arXiv:2505.07004), and the second moments are those of x times |g|.
For the embedding, which nothing is multiplied with, they are those of g itself.

llama.cpp reckons forward only. Here a model is read forward and backward in single precision by torch, one block of weights
at a time: `shape` is what a file says of its model, `glm4moe` what a block does, `program` goes through them.
"""

REVISION = 1
"""Raised whenever other moments come out; a build does not use again what was made by another one."""
ARCHITECTURES = ("glm4moe",)
"""Those that can be read backward: GLM-4.5, 4.6 and 4.7."""
