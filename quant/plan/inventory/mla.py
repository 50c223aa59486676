"""Latent attention (MLA): GLM-4.7-Flash (``deepseek2`` in GGUF) and GLM-5 (``glm-dsa``).

The converter splits the checkpoint's ``kv_b_proj`` into K and V parts, transposed for the absorbed
form of the attention (llama.cpp, conversion/deepseek.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.plan.inventory.config import f32, matrix
from quant.plan.inventory.moe import MoEConfig
from quant.plan.sizes import KVCache


@dataclass(frozen=True, kw_only=True)
class MLAConfig(MoEConfig):
    """What the two families share."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def kv_cache(self) -> KVCache:
        """Return the KV latent and the rotary part of the key, once for all heads."""
        return KVCache(
            layers=self.num_hidden_layers,
            kv_heads=1,
            key_length=self.kv_lora_rank + self.qk_rope_head_dim,
            value_length=0,
        )

    def indexer(self, n: int) -> Iterator[TensorSpec]:
        """Yield the sparse-attention indexer of block ``n``; most families have none."""
        yield from ()

    def attention(self, n: int) -> Iterator[TensorSpec]:
        """Yield Q, K and V through their latents, the output projection, and the indexer."""
        b, h, heads = f"blk.{n}", self.hidden_size, self.num_attention_heads
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        yield f32(f"{b}.attn_norm.weight", h)
        yield f32(f"{b}.ffn_norm.weight", h)
        yield f32(f"{b}.attn_q_a_norm.weight", self.q_lora_rank)
        yield f32(f"{b}.attn_kv_a_norm.weight", self.kv_lora_rank)
        yield matrix(f"{b}.attn_q_a.weight", h, self.q_lora_rank)
        yield matrix(f"{b}.attn_q_b.weight", self.q_lora_rank, heads * qk_head_dim)
        yield matrix(f"{b}.attn_kv_a_mqa.weight", h, self.kv_lora_rank + self.qk_rope_head_dim)
        # Rows of 192 in these models, no multiple of 256: types with superblocks do not fit.
        yield matrix(f"{b}.attn_k_b.weight", self.qk_nope_head_dim, self.kv_lora_rank, heads)
        yield matrix(f"{b}.attn_v_b.weight", self.kv_lora_rank, self.v_head_dim, heads)
        yield matrix(f"{b}.attn_output.weight", heads * self.v_head_dim, h)
        yield from self.indexer(n)


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLite(MLAConfig):
    """GLM-4.7-Flash."""


@dataclass(frozen=True, kw_only=True)
class GlmMoeDsa(MLAConfig):
    """GLM-5: an indexer in every block, MTP block included, selects the tokens to attend to."""

    index_n_heads: int = 32
    index_head_dim: int = 128
    indexer_types: tuple[str, ...] = ()
    """``full`` or ``shared`` for each trunk layer; empty means ``full`` for all.

    A shared layer reuses the selection of the one before it. 5.2 has such layers; 5 and 5.1 do not.
    """

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the indexer types: one per layer, all of them known."""
        layers, types = self.num_hidden_layers, self.indexer_types
        if types and len(types) != layers:
            yield f"indexer_types: expected {layers} of them, found {len(types)}"
        for unknown in sorted({*types} - {"full", "shared"}):
            yield f"indexer_types: expected 'full' or 'shared', found {unknown!r}"

    def indexer(self, n: int) -> Iterator[TensorSpec]:
        """Yield the lightning indexer of block ``n``, unless it shares another block's."""
        # A slice, because the list ends before the MTP block, which has an indexer of its own.
        if self.indexer_types[n : n + 1] == ("shared",):
            return
        b, width = f"blk.{n}", self.index_n_heads * self.index_head_dim
        yield f32(f"{b}.indexer.k_norm.weight", self.index_head_dim)
        yield f32(f"{b}.indexer.k_norm.bias", self.index_head_dim)
        # F32 by the converter (base.py: INDEXER_PROJ). llama-quantize quantizes it nevertheless.
        yield f32(f"{b}.indexer.proj.weight", self.hidden_size, self.index_n_heads)
        yield matrix(f"{b}.indexer.attn_k.weight", self.hidden_size, self.index_head_dim)
        yield matrix(f"{b}.indexer.attn_q_b.weight", self.q_lora_rank, width)
