"""Models with latent attention (MLA): GLM-4.7-Flash (``deepseek2`` in GGUF) and GLM-5 (``glm-dsa``).

The converter cuts the checkpoint's ``kv_b_proj`` in two, transposed for the absorbed form (conversion/deepseek.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.plan.inventory.config import f32, matrix
from quant.plan.inventory.moe import MoEConfig


@dataclass(frozen=True, kw_only=True)
class MLAConfig(MoEConfig):
    """What the two families have in common."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def kv_bytes_per_token(self) -> int:
        """The latent and the rotary part of every trunk layer."""
        return self.num_hidden_layers * (self.kv_lora_rank + self.qk_rope_head_dim) * 2

    def indexer(self, n: int) -> Iterator[TensorSpec]:
        """What a family adds to the attention of block ``n``."""
        yield from ()

    def attention(self, n: int) -> Iterator[TensorSpec]:
        """Queries, keys and values through their latents, the output, and the indexer where there is one."""
        b, h, heads = f"blk.{n}", self.hidden_size, self.num_attention_heads
        yield f32(f"{b}.attn_norm.weight", h)
        yield f32(f"{b}.ffn_norm.weight", h)
        yield f32(f"{b}.attn_q_a_norm.weight", self.q_lora_rank)
        yield f32(f"{b}.attn_kv_a_norm.weight", self.kv_lora_rank)
        yield matrix(f"{b}.attn_q_a.weight", h, self.q_lora_rank)
        yield matrix(
            f"{b}.attn_q_b.weight",
            self.q_lora_rank,
            heads * (self.qk_nope_head_dim + self.qk_rope_head_dim),
        )
        yield matrix(f"{b}.attn_kv_a_mqa.weight", h, self.kv_lora_rank + self.qk_rope_head_dim)
        yield matrix(f"{b}.attn_k_b.weight", self.qk_nope_head_dim, self.kv_lora_rank, heads)
        yield matrix(f"{b}.attn_v_b.weight", self.kv_lora_rank, self.v_head_dim, heads)
        yield matrix(f"{b}.attn_output.weight", heads * self.v_head_dim, h)
        yield from self.indexer(n)


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLite(MLAConfig):
    """GLM-4.7-Flash."""


@dataclass(frozen=True, kw_only=True)
class GlmMoeDsa(MLAConfig):
    """GLM-5: blocks, the MTP block among them, have an indexer that picks the tokens to attend to."""

    index_n_heads: int = 32
    index_head_dim: int = 128
    indexer_types: tuple[str, ...] = ()
    """``full`` or ``shared`` for each trunk layer: 5.2 lends some layers the picks of the one before; 5 and 5.1 do not."""

    def problems(self) -> Iterator[str]:
        """One type of indexer a layer, and none that is not known."""
        if self.indexer_types and len(self.indexer_types) != self.num_hidden_layers:
            yield f"indexer_types: expected {self.num_hidden_layers} of them, found {len(self.indexer_types)}"
        for found in sorted({*self.indexer_types} - {"full", "shared"}):
            yield f"indexer_types: expected 'full' or 'shared', found {found!r}"

    def indexer(self, n: int) -> Iterator[TensorSpec]:
        """The lightning indexer of block ``n``."""
        if self.indexer_types[n : n + 1] == ("shared",):
            return
        b = f"blk.{n}"
        yield f32(f"{b}.indexer.k_norm.weight", self.index_head_dim)
        yield f32(f"{b}.indexer.k_norm.bias", self.index_head_dim)
        yield f32(f"{b}.indexer.proj.weight", self.hidden_size, self.index_n_heads)
        yield matrix(f"{b}.indexer.attn_k.weight", self.hidden_size, self.index_head_dim)
        yield matrix(
            f"{b}.indexer.attn_q_b.weight",
            self.q_lora_rank,
            self.index_n_heads * self.index_head_dim,
        )
