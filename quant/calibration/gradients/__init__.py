"""Weight the Hessian of each matrix by gradients through the whole model.

Let a matrix lose a little, e. To second order the KL divergence from the original model is half of
Σ (gᵀ e x)² over the tokens. Here x is the input of the matrix, and g the gradient of the log
likelihood of a token with respect to its output, where the token is drawn from the model's own
prediction (Fisher information; Martens, arXiv:1412.1193). So tokens do not count alike: each is
weighted by |g|², as in GuidedQuant (Kim et al., 2025, arXiv:2505.07004), and the Hessian is that of
|g| x. The embedding is a lookup without inputs; its Hessian is that of g itself.

llama.cpp has no backward pass for these models, so torch runs them in F32, one block of weights
at a time: ``shape`` reads a GGUF's hyperparameters, ``glm4moe`` has the forward pass of a block,
and ``program`` runs forward and backward through all of them, in a child program. Another
architecture needs a module like ``glm4moe`` and its name in ARCHITECTURES.
"""

REVISION = 1
"""Raise it when the Hessians change; a build does not reuse those of another revision."""
ARCHITECTURES = ("glm4moe",)
"""Architectures with a backward pass: GLM-4.5, 4.6 and 4.7."""
