"""GLM-4.5, 4.5-Air, 4.6 and 4.7: ``Glm4MoeForCausalLM``, ``glm4moe`` in GGUF (llama.cpp, conversion/glm.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.plan.inventory.config import biased, f32, matrix
from quant.plan.inventory.moe import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Glm4Moe(MoEConfig):
    """Grouped-query attention and experts with a bias-corrected sigmoid router."""

    num_key_value_heads: int
    head_dim: int
    attention_bias: bool = False
    use_qk_norm: bool = False

    def kv_bytes_per_token(self) -> int:
        """Keys and values of every trunk layer."""
        return self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2 * 2

    def attention(self, n: int) -> Iterator[TensorSpec]:
        """Queries, keys and values with their biases and norms, and the output."""
        b, h, d = f"blk.{n}", self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        yield f32(f"{b}.attn_norm.weight", h)
        yield f32(f"{b}.post_attention_norm.weight", h)
        yield from biased(f"{b}.attn_q", h, q, self.attention_bias)
        yield from biased(f"{b}.attn_k", h, kv, self.attention_bias)
        yield from biased(f"{b}.attn_v", h, kv, self.attention_bias)
        yield matrix(f"{b}.attn_output.weight", q, h)
        if self.use_qk_norm:
            yield f32(f"{b}.attn_q_norm.weight", d)
            yield f32(f"{b}.attn_k_norm.weight", d)
