"""What the blocks of a GLM-4.x with experts do, in torch, under the names of GGUF. Pure.

After ``llm_build_glm4_moe`` and ``build_moe_ffn`` of llama.cpp. Arrays are (tokens, numbers).
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quant.calibration.gradients.shape import ModelShape

SMALLEST = 2.0**-14
"""Of the sum of shares; the smallest normal number of 16 bits."""


class Weights(Protocol):
    """The tensors of a model by their names."""

    def of(self, name: str) -> Tensor:
        """The numbers of a tensor."""

    def __contains__(self, name: str) -> bool:
        """Whether the model has it."""


class Product(Protocol):
    """Multiplies by a matrix, or by an expert's; whoever goes through the model may watch."""

    def __call__(self, name: str, x: Tensor, expert: int = 0) -> Tensor:
        """What comes out of the matrix."""


def compute_rotation(shape: ModelShape, context: int) -> Tensor:
    """Cosine and sine by which keys and queries are turned at every place: (2, context, rotated / 2)."""
    speeds = shape.theta ** (-torch.arange(0, shape.rotated, 2).double() / shape.rotated)
    angles = torch.outer(torch.arange(context).double(), speeds)
    return torch.stack((angles.cos(), angles.sin())).float()


def compute_block(
    shape: ModelShape, n: int, x: Tensor, turn: Tensor, weights: Weights, product: Product
) -> Tensor:
    """What a chunk of one text is after block n."""
    name = f"blk.{n}."
    x = x + _attention(
        shape,
        name,
        apply_rms_norm(shape, x, weights.of(f"{name}attn_norm.weight")),
        turn,
        weights,
        product,
    )
    h = apply_rms_norm(shape, x, weights.of(f"{name}post_attention_norm.weight"))
    if n < shape.dense:
        return x + _feed_forward(name, "", h, product)
    return (
        x + _feed_forward(name, "_shexp", h, product) + _experts(shape, name, h, weights, product)
    )


def apply_rms_norm(shape: ModelShape, x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.epsilon) * weight


def _attention(
    shape: ModelShape, name: str, h: Tensor, turn: Tensor, weights: Weights, product: Product
) -> Tensor:
    tokens, (q, k, v) = len(h), (_projected(name, part, h, weights, product) for part in "qkv")
    q, k = q.view(tokens, shape.heads, shape.key), k.view(tokens, shape.kv_heads, shape.key)
    if f"{name}attn_q_norm.weight" in weights:  # GLM-4.5-Air has none
        q = apply_rms_norm(shape, q, weights.of(f"{name}attn_q_norm.weight"))
        k = apply_rms_norm(shape, k, weights.of(f"{name}attn_k_norm.weight"))
    q, k = (_turned(shape, a.transpose(0, 1), turn) for a in (q, k))
    v = v.view(tokens, shape.kv_heads, shape.value).transpose(0, 1)
    k, v = (a.repeat_interleave(shape.heads // shape.kv_heads, 0) for a in (k, v))
    seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return product(f"{name}attn_output.weight", seen.transpose(0, 1).reshape(tokens, -1))


def _projected(name: str, part: str, h: Tensor, weights: Weights, product: Product) -> Tensor:
    made, bias = product(f"{name}attn_{part}.weight", h), f"{name}attn_{part}.bias"
    return made + weights.of(bias) if bias in weights else made


def _turned(shape: ModelShape, x: Tensor, turn: Tensor) -> Tensor:
    """The first numbers of each head turned by their places, the first half with the second (LLAMA_ROPE_TYPE_NEOX)."""
    cos, sin = turn
    first, second = x[..., : shape.rotated].chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, x[..., shape.rotated :]), -1)


def _feed_forward(name: str, kind: str, h: Tensor, product: Product, expert: int = 0) -> Tensor:
    gate = functional.silu(product(f"{name}ffn_gate{kind}.weight", h, expert))
    up = product(f"{name}ffn_up{kind}.weight", h, expert)
    return product(f"{name}ffn_down{kind}.weight", gate * up, expert)


def _experts(shape: ModelShape, name: str, h: Tensor, weights: Weights, product: Product) -> Tensor:
    """The sum of what a token's experts say, each by its share. Who is chosen has no gradient."""
    scores = torch.sigmoid(h @ weights.of(f"{name}ffn_gate_inp.weight").T)
    bias = f"{name}exp_probs_b.bias"
    ranked = scores + weights.of(bias) if bias in weights else scores
    chosen = ranked.topk(shape.used, -1).indices
    shares = scores.gather(1, chosen)
    if shape.norm:
        shares = shares / shares.sum(-1, keepdim=True).clamp_min(SMALLEST)
    shares = shares * shape.scale
    found = torch.zeros_like(h)
    for expert in range(shape.experts):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        if len(tokens):
            said = _feed_forward(name, "_exps", h[tokens], product, expert)
            found = found.index_add(0, tokens, said * shares[tokens, places, None])
    return found
