"""GLM-4.5, 4.5-Air, 4.6 and 4.7: ``Glm4MoeForCausalLM``, ``glm4moe`` in GGUF.

Source: llama.cpp, conversion/glm.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.plan.inventory.config import f32, linear, matrix
from quant.plan.inventory.moe import MoEConfig
from quant.plan.sizes import KVCache


@dataclass(frozen=True, kw_only=True)
class Glm4Moe(MoEConfig):
    """Grouped-query attention, and experts with a bias-corrected sigmoid router."""

    num_key_value_heads: int
    # No default: 4.6 has 96 heads of 128 at a hidden size of 5120.
    head_dim: int
    attention_bias: bool = False
    use_qk_norm: bool = False

    def kv_cache(self) -> KVCache:
        """Return K and V of every trunk layer."""
        return KVCache(
            layers=self.num_hidden_layers,
            kv_heads=self.num_key_value_heads,
            key_length=self.head_dim,
            value_length=self.head_dim,
        )

    def attention(self, n: int) -> Iterator[TensorSpec]:
        """Yield Q, K and V with their biases and norms, and the output projection."""
        b, h, d, bias = f"blk.{n}", self.hidden_size, self.head_dim, self.attention_bias
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        yield f32(f"{b}.attn_norm.weight", h)
        # The norm before the feed-forward part. This architecture has no ffn_norm.
        yield f32(f"{b}.post_attention_norm.weight", h)
        yield from linear(f"{b}.attn_q", h, q, bias=bias)
        yield from linear(f"{b}.attn_k", h, kv, bias=bias)
        yield from linear(f"{b}.attn_v", h, kv, bias=bias)
        yield matrix(f"{b}.attn_output.weight", q, h)
        if self.use_qk_norm:
            yield f32(f"{b}.attn_q_norm.weight", d)
            yield f32(f"{b}.attn_k_norm.weight", d)
