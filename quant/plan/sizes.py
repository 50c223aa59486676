"""Forecast what a planned variant weighs: file, shards, KV cache, memory, disk. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.llama.gguf import Header, TensorSpec, pad
from quant.llama.tensors import EXPERTS, MAX_STRING, split_into_shards, stored_shape, tensor_class
from quant.plan.plan import Plan
from quant.plan.recipe import ModelRecipe, parse_size

MATRIX_NAME, TEXT_NAME = "imatrix.gguf", "calibration.txt"
"""File names that llama-quantize and llama-imatrix get and write into their output.

They are published, so they hold no path of the machine.
"""
# GGUF (docs/gguf.md of ggml): a string is its length in 8 bytes and its text. An entry is a string,
# a type in 4 bytes, and the value.
U32_BYTES, STRING_BYTES = 4, 8
F16_BYTES = 2


@dataclass(frozen=True)
class ClassShare:
    """All tensors of one class that are stored as one type."""

    name: str
    """Tensor name without the block: ffn_down_exps."""
    type: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Shape of a model's KV cache.

    Standard attention caches K and V of every KV head. Latent attention (MLA) caches one vector for
    all heads, the KV latent and the rotary part of the key; V is a view of it and takes no memory
    of its own (llama.cpp, src/llama-kv-cache.cpp: ``has_v = !is_mla``).

    The cache of GLM-5's sparse-attention indexer is not counted.
    """

    layers: int
    """Trunk layers; an MTP block has no cache in an ordinary context (src/llama-model.cpp)."""
    kv_heads: int
    key_length: int
    """Values of one head's key; with MLA, latent and rotary part together."""
    value_length: int
    """Values of one head's value; 0 with MLA."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of context, in F16."""
        return self.layers * self.kv_heads * (self.key_length + self.value_length) * F16_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes that a variant needs at one context length, without compute buffers."""

    weights: int
    experts: int
    """Bytes of routed experts among the weights; they can stay in main memory (-ot exps=CPU)."""
    cache: int
    """Bytes of the KV cache for the whole context, in F16."""

    @property
    def whole(self) -> int:
        """Bytes when everything is in one memory."""
        return self.weights + self.cache

    @property
    def without_experts(self) -> int:
        """Bytes on the accelerator when the experts stay in main memory."""
        return self.whole - self.experts


def summarize_classes(plan: Plan) -> tuple[ClassShare, ...]:
    """Return the plan by tensor class and type, in file order of their first tensors."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for t in plan.tensors:
        sizes.setdefault((tensor_class(t.tensor.name), t.type.name), []).append(t.bytes)
    return tuple(
        ClassShare(name, ggml_type, len(group), sum(group))
        for (name, ggml_type), group in sizes.items()
    )


def estimate_build_bytes(
    tensors: Sequence[TensorSpec], plans: Sequence[Plan], model: ModelRecipe
) -> int:
    """Return the disk space that a build takes.

    It is the sum of downloaded weights, the BF16 file, its Q8_0 copy if the imatrix reads one, and
    every variant. The release folder is not counted: its files are hard links where one disk holds
    both.

    Args:
        tensors: All tensors of the BF16 file.
        plans: The variants to build.
        model: The recipe, for its source, imatrix base and shard size.
    """
    base = sum(t.bytes for t in tensors)
    downloaded = base if model.source.repo else 0
    # Q8_0 takes 34 bytes for 32 weights, BF16 64.
    q8_copy = base * 17 // 32 if model.imatrix.base == "Q8_0" else 0
    limit = parse_size(model.max_shard_size)
    # The BF16 variant is the converted file itself, unless it is cut into shards.
    written = sum(p.bytes for p in plans if not p.is_base or (p.variant.split and p.bytes > limit))
    return downloaded + base + q8_copy + written


def estimate_memory(plan: Plan, kv_bytes_per_token: int, context: int) -> Memory:
    """Return the memory that running a variant takes.

    Args:
        plan: The variant.
        kv_bytes_per_token: Bytes of KV cache for one token.
        context: Context length in tokens.
    """
    experts = sum(t.bytes for t in plan.tensors if EXPERTS.fullmatch(t.tensor.name))
    return Memory(
        weights=sum(t.bytes for t in plan.tensors),
        experts=experts,
        cache=kv_bytes_per_token * context,
    )


def read_kv_cache(metadata: Mapping[str, Any]) -> KVCache:
    """Return the shape of the KV cache from GGUF metadata; zeros where a key is missing.

    With MLA the converter writes one KV head whose key is latent and rotary part, and beside it
    ``attention.kv_lora_rank`` (llama.cpp, conversion/deepseek.py).
    """
    prefix = f"{metadata.get('general.architecture')}."
    keys = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    layers = keys.get("block_count", 0) - keys.get("nextn_predict_layers", 0)
    if rank := keys.get("attention.kv_lora_rank"):
        latent = rank + keys.get("rope.dimension_count", 0)
        return KVCache(layers=layers, kv_heads=1, key_length=latent, value_length=0)
    heads = keys.get("attention.head_count", 0)
    # llama.cpp's default for models without key_length: n_embd / n_head.
    head_width = keys.get("embedding_length", 0) // heads if heads else 0
    kv_heads = keys.get("attention.head_count_kv", heads)
    if isinstance(kv_heads, Sequence):  # one number a layer: as one layer with all of them
        layers, kv_heads = 1, sum(kv_heads[:layers])
    return KVCache(
        layers=layers,
        kv_heads=kv_heads,
        key_length=keys.get("attention.key_length", head_width),
        value_length=keys.get("attention.value_length", head_width),
    )


def kv_cache_bytes(header: Header, context: int) -> int:
    """Return the bytes of a file's KV cache for ``context`` tokens, in F16; 0 if it is unknown."""
    return read_kv_cache(header.metadata).bytes_per_token * context


def forecast_file_bytes(plan: Plan, base: Header, imatrix: Header | None = None) -> int:
    """Return the length of the file that llama-quantize writes: head, added metadata, tensors.

    Args:
        plan: The variant.
        base: Head of the BF16 file.
        imatrix: Head of the imatrix; None assumes one that this project computed.
    """
    if plan.is_base:
        return base.data_start + plan.bytes
    # Numbers have one width, so 0 stands for any.
    added = {"general.quantization_version": 0, "general.file_type": 0} | _imatrix_keys(imatrix)
    # A key that the base has already is overwritten in its place, not added.
    replaced = {k: v for k, v in base.metadata.items() if k in added}
    head = (
        base.head_bytes
        + sum(_key_bytes(*kv) for kv in added.items())
        - sum(_key_bytes(*kv) for kv in replaced.items())
    )
    # ggml drops trailing dimensions of 1: eight bytes less for each.
    head -= 8 * sum(len(t.shape) - len(stored_shape(t)) for t in base.tensors)
    return pad(head) + plan.bytes


def _imatrix_keys(imatrix: Header | None) -> dict[str, str | int]:
    """Return the keys that llama-quantize (tools/quantize/quantize.cpp) writes of an imatrix."""
    metadata: dict[str, Any] = (
        imatrix.metadata if imatrix else {"imatrix.datasets": [TEXT_NAME], "imatrix.chunk_count": 1}
    )
    keys: dict[str, str | int] = {
        "quantize.imatrix.file": MATRIX_NAME,
        "quantize.imatrix.entries_count": 0,
    }
    if datasets := metadata.get("imatrix.datasets"):
        keys["quantize.imatrix.dataset"] = datasets[0]
    if metadata.get("imatrix.chunk_count"):
        keys["quantize.imatrix.chunks_count"] = 0
    return keys


def _key_bytes(key: str, value: str | int) -> int:
    """Return the bytes of one metadata entry in a GGUF head; numbers are 32 bits wide."""
    text = len(value.encode()[:MAX_STRING]) + STRING_BYTES if isinstance(value, str) else U32_BYTES
    return STRING_BYTES + len(key.encode()) + U32_BYTES + text


def forecast_shard_bytes(plan: Plan, max_bytes: int) -> tuple[int, ...]:
    """Return the tensor bytes of each shard, cut as llama-gguf-split does, without the heads.

    Tensors stay in order; a new shard begins before ``max_bytes`` is exceeded. A larger tensor
    stands alone.
    """
    return tuple(
        sum(shard) for shard in split_into_shards((pad(t.bytes) for t in plan.tensors), max_bytes)
    )


def find_oversized(plan: Plan, max_size: str) -> Iterator[str]:
    """Yield every tensor that is larger than a shard, if the variant's file would be cut.

    Args:
        plan: The variant.
        max_size: The largest shard, such as 50G.
    """
    limit = parse_size(max_size)
    if plan.variant.split and plan.bytes > limit:
        yield from (
            f"variant {plan.variant.name}: tensor {t.tensor.name}: expected at most {max_size}"
            f" a shard, found {t.bytes} bytes"
            for t in plan.tensors
            if t.bytes > limit
        )
