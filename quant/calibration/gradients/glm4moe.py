"""The forward pass of a block of GLM-4.x with experts, in torch, with GGUF's tensor names. Pure.

It follows ``llm_build_glm4_moe`` (src/models/glm4-moe.cpp) and ``build_moe_ffn``
(src/llama-graph.cpp) of llama.cpp. Arrays are (tokens, features).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quant.calibration.gradients.shape import ModelShape

SMALLEST_SUM = 2.0**-14
"""Lower bound of the sum of a token's expert weights: the smallest normal F16 (build_moe_ffn)."""


class Weights(Protocol):
    """The tensors of a model by name."""

    def read(self, name: str) -> Tensor:
        """Return the values of a tensor."""

    def __contains__(self, name: str) -> bool:
        """Return whether the model has it."""


class Product(Protocol):
    """Multiplies by a matrix, or by an expert's matrix. Whoever runs the model may watch it."""

    def __call__(self, name: str, x: Tensor, expert: int = 0) -> Tensor:
        """Return x multiplied by the matrix, (tokens, rows of the matrix)."""


@dataclass(frozen=True)
class BlockContext:
    """What every block of a model needs."""

    shape: ModelShape
    rotation: Tensor
    """From :func:`compute_rotation`."""
    weights: Weights
    product: Product


def compute_rotation(shape: ModelShape, context: int) -> Tensor:
    """Return cosine and sine of the rotary embedding by position: (2, context, rotated / 2)."""
    # In double: single precision holds an angle of 500 radians to 1.5e-5 only.
    speeds = shape.theta ** (-torch.arange(0, shape.rotated, 2).double() / shape.rotated)
    angles = torch.outer(torch.arange(context).double(), speeds)
    return torch.stack((angles.cos(), angles.sin())).float()


def compute_block(context: BlockContext, n: int, x: Tensor) -> Tensor:
    """Return the output of block n for one chunk, (tokens, width)."""
    shape, weights, name = context.shape, context.weights, f"blk.{n}."
    h = apply_rms_norm(shape, x, weights.read(f"{name}attn_norm.weight"))
    x = x + _compute_attention(context, name, h)
    h = apply_rms_norm(shape, x, weights.read(f"{name}post_attention_norm.weight"))
    if n < shape.dense:
        return x + _feed_forward(name, "", h, context.product)
    shared = _feed_forward(name, "_shexp", h, context.product)
    return x + shared + _compute_experts(context, name, h)


def apply_rms_norm(shape: ModelShape, x: Tensor, weight: Tensor) -> Tensor:
    """Return RMSNorm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.epsilon) * weight


def _compute_attention(context: BlockContext, name: str, h: Tensor) -> Tensor:
    shape, weights, tokens = context.shape, context.weights, len(h)
    q, k, v = (_project(context, name, part, h) for part in "qkv")
    q, k = q.view(tokens, shape.heads, shape.key), k.view(tokens, shape.kv_heads, shape.key)
    if f"{name}attn_q_norm.weight" in weights:  # GLM-4.5-Air has none
        q = apply_rms_norm(shape, q, weights.read(f"{name}attn_q_norm.weight"))
        k = apply_rms_norm(shape, k, weights.read(f"{name}attn_k_norm.weight"))
    q, k = (_rotate(shape, a.transpose(0, 1), context.rotation) for a in (q, k))
    v = v.view(tokens, shape.kv_heads, shape.value).transpose(0, 1)
    # Grouped-query attention: each key and value head serves several query heads.
    k, v = (a.repeat_interleave(shape.heads // shape.kv_heads, 0) for a in (k, v))
    # torch's default scale is llama.cpp's kq_scale, 1 / sqrt(features of a head's key).
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return context.product(f"{name}attn_output.weight", mixed.transpose(0, 1).reshape(tokens, -1))


def _project(context: BlockContext, name: str, part: str, h: Tensor) -> Tensor:
    """Return queries, keys or values, with their bias if the model has one."""
    projection = context.product(f"{name}attn_{part}.weight", h)
    bias = f"{name}attn_{part}.bias"
    return projection + context.weights.read(bias) if bias in context.weights else projection


def _rotate(shape: ModelShape, x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the first features of each head by position, the first half with the second half.

    This is LLAMA_ROPE_TYPE_NEOX. Features beyond ``rotated`` stay as they are.
    """
    cos, sin = rotation
    first, second = x[..., : shape.rotated].chunk(2, -1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*rotated, x[..., shape.rotated :]), -1)


def _feed_forward(name: str, kind: str, h: Tensor, product: Product, expert: int = 0) -> Tensor:
    """Return SwiGLU: down(silu(gate(h)) * up(h))."""
    gate = functional.silu(product(f"{name}ffn_gate{kind}.weight", h, expert))
    up = product(f"{name}ffn_up{kind}.weight", h, expert)
    return product(f"{name}ffn_down{kind}.weight", gate * up, expert)


def _compute_experts(context: BlockContext, name: str, h: Tensor) -> Tensor:
    """Return the weighted sum of the outputs of each token's experts."""
    shape, weights = context.shape, context.weights
    # Not by product(): llama-quantize leaves the router in F32, so nobody needs its Hessian.
    scores = torch.sigmoid(h @ weights.read(f"{name}ffn_gate_inp.weight").T)
    # The bias ranks experts for load balancing, and does not enter their weights (build_moe_ffn:
    # selection_probs). The choice is not differentiable, so no gradient goes through it.
    bias = f"{name}exp_probs_b.bias"
    ranking = scores + weights.read(bias) if bias in weights else scores
    chosen = ranking.topk(shape.used, -1).indices
    shares = scores.gather(1, chosen)
    if shape.norm:
        shares = shares / shares.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    shares = shares * shape.scale
    total = torch.zeros_like(h)
    for expert in range(shape.experts):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        if len(tokens):
            output = _feed_forward(name, "_exps", h[tokens], context.product, expert)
            total = total.index_add(0, tokens, output * shares[tokens, places, None])
    return total
