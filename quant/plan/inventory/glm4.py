"""Dense GLM-4: ``Glm4ForCausalLM`` and GLM-4.6V-Flash's text part, ``glm4`` in GGUF.

Source: llama.cpp, conversion/glm.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.plan.inventory.config import (
    ArchitectureConfig,
    embedding_and_output,
    f32,
    linear,
    matrix,
)
from quant.plan.sizes import KVCache


@dataclass(frozen=True)
class Glm4(ArchitectureConfig):
    """Norms before and after each half of a block; gate and up projection are one matrix."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int = 0
    """Width of one head; 0 divides the hidden size among the heads."""
    attention_bias: bool = True
    """Biases of Q, K and V; transformers assumes true when config.json does not say it."""
    tie_word_embeddings: bool = False

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def kv_cache(self) -> KVCache:
        """Return K and V of every layer."""
        return KVCache(
            layers=self.num_hidden_layers,
            kv_heads=self.num_key_value_heads,
            key_length=self.head_width,
            value_length=self.head_width,
        )

    def iter_tensors(self) -> Iterator[TensorSpec]:
        """Yield embedding and output, and every block."""
        h, bias = self.hidden_size, self.attention_bias
        q = self.num_attention_heads * self.head_width
        kv = self.num_key_value_heads * self.head_width
        yield from embedding_and_output(h, self.vocab_size, tied=self.tie_word_embeddings)
        for b in (f"blk.{n}" for n in range(self.num_hidden_layers)):
            for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
                yield f32(f"{b}.{norm}.weight", h)
            # The output projection has no bias, whatever attention_bias is (transformers,
            # Glm4Attention).
            yield from linear(f"{b}.attn_q", h, q, bias=bias)
            yield from linear(f"{b}.attn_k", h, kv, bias=bias)
            yield from linear(f"{b}.attn_v", h, kv, bias=bias)
            yield matrix(f"{b}.attn_output.weight", q, h)
            # The checkpoint's gate_up_proj, whose halves llama.cpp splits at run time.
            yield matrix(f"{b}.ffn_up.weight", h, 2 * self.intermediate_size)
            yield matrix(f"{b}.ffn_down.weight", self.intermediate_size, h)
