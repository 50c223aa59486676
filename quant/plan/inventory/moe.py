"""Mixture of experts behind dense layers, MTP blocks at the end: GLM's large models."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.plan.inventory.config import ArchitectureConfig, embedding_and_output, f32, matrix


@dataclass(frozen=True, kw_only=True)
class MoEConfig(ArchitectureConfig):
    """Everything but the attention, which families add."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    first_k_dense_replace: int
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    mtp_own_embedding: bool = False
    """Whether the MTP block has an embedding and a head of its own.

    config.json does not say it. True for 4.5, 4.7 and 4.7-Flash; false for 4.6 and 5.
    """

    def iter_tensors(self) -> Iterator[TensorSpec]:
        """Yield embedding and output, then block by block attention, feed-forward and MTP parts."""
        yield from embedding_and_output(
            self.hidden_size, self.vocab_size, tied=self.tie_word_embeddings
        )
        for n in range(self.num_hidden_layers + self.num_nextn_predict_layers):
            yield from self.attention(n)
            yield from self._feed_forward(n)
            if n >= self.num_hidden_layers:
                yield from self._mtp(f"blk.{n}")

    @abstractmethod
    def attention(self, n: int) -> Iterator[TensorSpec]:
        """Yield the attention of block ``n``, and the norms of attention and feed-forward part."""

    def _feed_forward(self, n: int) -> Iterator[TensorSpec]:
        """Yield the feed-forward part of block ``n``: one network, or a router and experts."""
        b, h, m = f"blk.{n}", self.hidden_size, self.moe_intermediate_size
        if n < self.first_k_dense_replace:
            yield from gated_ffn(b, "", h, self.intermediate_size)
            return
        yield f32(f"{b}.ffn_gate_inp.weight", h, self.n_routed_experts)
        yield f32(f"{b}.exp_probs_b.bias", self.n_routed_experts)
        for part in ("gate", "up"):
            yield matrix(f"{b}.ffn_{part}_exps.weight", h, m, self.n_routed_experts)
        yield matrix(f"{b}.ffn_down_exps.weight", m, h, self.n_routed_experts)
        if self.n_shared_experts:
            # All shared experts are one network of their joint width.
            yield from gated_ffn(b, "_shexp", h, m * self.n_shared_experts)

    def _mtp(self, b: str) -> Iterator[TensorSpec]:
        """Yield what makes block ``b`` predict the token after the next (MTP)."""
        # Its input is the token's embedding and the trunk's last hidden state, side by side.
        yield matrix(f"{b}.nextn.eh_proj.weight", 2 * self.hidden_size, self.hidden_size)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            yield f32(f"{b}.nextn.{norm}.weight", self.hidden_size)
        if self.mtp_own_embedding:
            yield matrix(f"{b}.nextn.embed_tokens.weight", self.hidden_size, self.vocab_size)
            yield matrix(f"{b}.nextn.shared_head_head.weight", self.hidden_size, self.vocab_size)


def gated_ffn(b: str, suffix: str, hidden: int, width: int) -> Iterator[TensorSpec]:
    """Yield gate, up and down projection of a gated feed-forward network."""
    yield matrix(f"{b}.ffn_gate{suffix}.weight", hidden, width)
    yield matrix(f"{b}.ffn_up{suffix}.weight", hidden, width)
    yield matrix(f"{b}.ffn_down{suffix}.weight", width, hidden)
