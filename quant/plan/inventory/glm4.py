"""Dense GLM-4: ``Glm4ForCausalLM`` and the text of GLM-4.6V-Flash, ``glm4`` in GGUF (llama.cpp, conversion/glm.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.plan.inventory.config import ArchitectureConfig, biased, ends, f32, matrix


@dataclass(frozen=True)
class Glm4(ArchitectureConfig):
    """Norms before and after each half of a block; gate and up are one matrix."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int = 0
    """0: the hidden size shared among the heads."""
    attention_bias: bool = True
    """Of queries, keys and values; what transformers takes when config.json does not say."""
    tie_word_embeddings: bool = False

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def kv_bytes_per_token(self) -> int:
        """Keys and values of every layer."""
        return self.num_hidden_layers * self.num_key_value_heads * self.head * 2 * 2

    def walk(self) -> Iterator[TensorSpec]:
        """The ends, and every block."""
        h, q, kv = (
            self.hidden_size,
            self.num_attention_heads * self.head,
            self.num_key_value_heads * self.head,
        )
        yield from ends(h, self.vocab_size, self.tie_word_embeddings)
        for b in (f"blk.{n}" for n in range(self.num_hidden_layers)):
            for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
                yield f32(f"{b}.{norm}.weight", h)
            yield from biased(f"{b}.attn_q", h, q, self.attention_bias)
            yield from biased(f"{b}.attn_k", h, kv, self.attention_bias)
            yield from biased(f"{b}.attn_v", h, kv, self.attention_bias)
            yield matrix(f"{b}.attn_output.weight", q, h)
            yield matrix(f"{b}.ffn_up.weight", h, 2 * self.intermediate_size)
            yield matrix(f"{b}.ffn_down.weight", self.intermediate_size, h)
