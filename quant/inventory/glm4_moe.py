"""GLM-4.5, 4.5-Air, 4.6 and 4.7: ``Glm4MoeForCausalLM``, ``glm4moe`` in GGUF (llama.cpp, conversion/glm.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.header import TensorSpec
from quant.inventory.numbers import Numbers, f32, matrix


@dataclass(frozen=True)
class Experts:
    """The numbers of a mixture of experts behind some dense layers, with MTP blocks at the end."""

    hidden: int
    dense_width: int
    expert_width: int
    experts: int
    shared: int
    vocabulary: int
    own_embedding: bool

    def feed_forward(self, b: str, dense: bool) -> Iterator[TensorSpec]:
        """The feed-forward part of block ``b``: one network, or a router with its experts."""
        h, m, s = self.hidden, self.expert_width, self.expert_width * self.shared
        if dense:
            yield from gated(b, "", h, self.dense_width)
            return
        yield f32(f"{b}.ffn_gate_inp.weight", h, self.experts)
        yield f32(f"{b}.exp_probs_b.bias", self.experts)
        for part in ("gate", "up"):
            yield matrix(f"{b}.ffn_{part}_exps.weight", h, m, self.experts)
        yield matrix(f"{b}.ffn_down_exps.weight", m, h, self.experts)
        if s:
            yield from gated(b, "_shexp", h, s)

    def prediction(self, b: str) -> Iterator[TensorSpec]:
        """What makes of block ``b`` one that predicts the token after the next (MTP)."""
        yield matrix(f"{b}.nextn.eh_proj.weight", 2 * self.hidden, self.hidden)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            yield f32(f"{b}.nextn.{norm}.weight", self.hidden)
        if self.own_embedding:
            yield matrix(f"{b}.nextn.embed_tokens.weight", self.hidden, self.vocabulary)
            yield matrix(f"{b}.nextn.shared_head_head.weight", self.hidden, self.vocabulary)


def gated(b: str, suffix: str, hidden: int, width: int) -> Iterator[TensorSpec]:
    """A gated feed-forward network."""
    yield matrix(f"{b}.ffn_gate{suffix}.weight", hidden, width)
    yield matrix(f"{b}.ffn_up{suffix}.weight", hidden, width)
    yield matrix(f"{b}.ffn_down{suffix}.weight", width, hidden)


def ends(hidden: int, vocabulary: int, tied: bool) -> Iterator[TensorSpec]:
    """The embedding, the last norm, and the output unless the embedding serves as one."""
    yield matrix("token_embd.weight", hidden, vocabulary)
    yield f32("output_norm.weight", hidden)
    if not tied:
        yield matrix("output.weight", hidden, vocabulary)


@dataclass(frozen=True)
class Glm4Moe(Numbers):
    """Grouped-query attention and experts with a bias-corrected sigmoid router."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    first_k_dense_replace: int
    head_dim: int
    attention_bias: bool = False
    use_qk_norm: bool = False
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    mtp_own_embedding: bool = False
    """The MTP block has an embedding and a head of its own: 4.5 and 4.7 yes, 4.6 no. config.json does not say."""

    @property
    def experts(self) -> Experts:
        """The feed-forward side."""
        return Experts(
            self.hidden_size, self.intermediate_size, self.moe_intermediate_size, self.n_routed_experts,
            self.n_shared_experts, self.vocab_size, self.mtp_own_embedding,
        )  # fmt: skip

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the BF16 file."""
        return tuple(self._walk())

    def kv_bytes_per_token(self) -> int:
        """Keys and values of every trunk layer."""
        return self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2 * 2

    def _walk(self) -> Iterator[TensorSpec]:
        yield from ends(self.hidden_size, self.vocab_size, self.tie_word_embeddings)
        for n in range(self.num_hidden_layers + self.num_nextn_predict_layers):
            b = f"blk.{n}"
            yield from self._attention(b)
            yield from self.experts.feed_forward(b, dense=n < self.first_k_dense_replace)
            if n >= self.num_hidden_layers:
                yield from self.experts.prediction(b)

    def _attention(self, b: str) -> Iterator[TensorSpec]:
        h, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield f32(f"{b}.attn_norm.weight", h)
        yield f32(f"{b}.post_attention_norm.weight", h)
        yield from biased(f"{b}.attn_q", h, q, self.attention_bias)
        yield from biased(f"{b}.attn_k", h, kv, self.attention_bias)
        yield from biased(f"{b}.attn_v", h, kv, self.attention_bias)
        yield matrix(f"{b}.attn_output.weight", q, h)
        if self.use_qk_norm:
            yield f32(f"{b}.attn_q_norm.weight", self.head_dim)
            yield f32(f"{b}.attn_k_norm.weight", self.head_dim)


def biased(name: str, rows: int, columns: int, bias: bool) -> Iterator[TensorSpec]:
    """A matrix, and its bias if it has one."""
    yield matrix(f"{name}.weight", rows, columns)
    if bias:
        yield f32(f"{name}.bias", columns)
