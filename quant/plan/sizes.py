"""What a planned variant will weigh: by class of tensor, in shards, and in the memory of who runs it. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quant.llama.gguf import Header, TensorSpec, pad
from quant.llama.tensors import EXPERTS, MAX_STRING, split_into_shards, stored_shape, tensor_class
from quant.plan.plan import Plan
from quant.plan.recipe import ModelRecipe, parse_size

GIB = 2**30

MATRIX_NAME, TEXT_NAME = "imatrix.gguf", "calibration.txt"
"""What llama-quantize and llama-imatrix are shown, and write into their files: names that may be published."""
U32_BYTES, STRING_BYTES = 4, 8


@dataclass(frozen=True)
class ClassShare:
    """All tensors of one kind that are stored as one type."""

    name: str
    """The tensors' name without the block: ffn_down_exps."""
    type: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes to run a variant at a length of context, without the buffers of computation."""

    weights: int
    experts: int
    """Of the weights, those of routed experts, which many keep in main memory."""
    cache: int
    """Keys and values of the whole context, in F16."""

    @property
    def whole(self) -> int:
        """Everything in one memory."""
        return self.weights + self.cache

    @property
    def without_experts(self) -> int:
        """On the accelerator, when the experts stay in main memory."""
        return self.whole - self.experts


def summarize_classes(plan: Plan) -> tuple[ClassShare, ...]:
    """The plan by class and type, in the order in which they first stand in the file."""
    found: dict[tuple[str, str], list[int]] = {}
    for t in plan.tensors:
        found.setdefault((tensor_class(t.tensor.name), t.type.name), []).append(t.bytes)
    return tuple(
        ClassShare(name, kind, len(sizes), sum(sizes)) for (name, kind), sizes in found.items()
    )


def estimate_build_bytes(
    tensors: Sequence[TensorSpec], plans: Sequence[Plan], model: ModelRecipe
) -> int:
    """What a build takes: weights that are fetched, the BF16 file, its Q8_0 for the imatrix, every variant.

    The release's files are second names of these where one disk has both.
    """
    base = sum(t.bytes for t in tensors)
    fetched = base if model.source.repo else 0
    small = base * 17 // 32 if model.imatrix.base == "Q8_0" else 0
    limit = parse_size(model.max_shard_size)
    written = sum(p.bytes for p in plans if not p.is_base or (p.variant.split and p.bytes > limit))
    return fetched + base + small + written


def estimate_memory(plan: Plan, kv_bytes_per_token: int, context: int) -> Memory:
    """What running the variant takes."""
    experts = sum(t.bytes for t in plan.tensors if EXPERTS.fullmatch(t.tensor.name))
    return Memory(sum(t.bytes for t in plan.tensors), experts, kv_bytes_per_token * context)


def forecast_file_bytes(plan: Plan, base: Header, matrix: Header | None = None) -> int:
    """Length of the whole file that llama-quantize makes of the BF16 file: the head with what is added to it, the tensors.

    Without the head of an imatrix, one of this project's is meant.
    """
    if plan.is_base:
        return base.data_start + plan.bytes
    added = {"general.quantization_version": 0, "general.file_type": 0} | _about(matrix)
    replaced = {k: v for k, v in base.metadata.items() if k in added}
    head = (
        base.head_bytes
        + sum(_key_bytes(*kv) for kv in added.items())
        - sum(_key_bytes(*kv) for kv in replaced.items())
    )
    head -= 8 * sum(len(t.shape) - len(stored_shape(t)) for t in base.tensors)
    return pad(head) + plan.bytes


def _about(matrix: Header | None) -> dict[str, str | int]:
    """What llama-quantize writes of the imatrix (tools/quantize/quantize.cpp)."""
    known: dict[str, Any] = (
        matrix.metadata if matrix else {"imatrix.datasets": [TEXT_NAME], "imatrix.chunk_count": 1}
    )
    about: dict[str, str | int] = {
        "quantize.imatrix.file": MATRIX_NAME,
        "quantize.imatrix.entries_count": 0,
    }
    if datasets := known.get("imatrix.datasets"):
        about["quantize.imatrix.dataset"] = datasets[0]
    if known.get("imatrix.chunk_count"):
        about["quantize.imatrix.chunks_count"] = 0
    return about


def _key_bytes(key: str, value: str | int) -> int:
    """Length of a key in the head of a file; numbers are 32 bits wide."""
    text = len(value.encode()[:MAX_STRING]) + STRING_BYTES if isinstance(value, str) else U32_BYTES
    return STRING_BYTES + len(key.encode()) + U32_BYTES + text


def forecast_shard_bytes(plan: Plan, max_bytes: int) -> tuple[int, ...]:
    """Bytes of tensors in each shard, as llama-gguf-split cuts: in order, a new shard before the limit is passed.

    A tensor that is larger than the limit stands alone; the heads of the files come on top.
    """
    return tuple(
        sum(run) for run in split_into_shards((pad(t.bytes) for t in plan.tensors), max_bytes)
    )


def find_oversized(plan: Plan, max_size: str) -> Iterator[str]:
    """Every tensor that no shard can hold, if the variant's file would be cut; ``max_size`` is 50G or the like."""
    limit = parse_size(max_size)
    if plan.variant.split and plan.bytes > limit:
        yield from (
            f"variant {plan.variant.name}: tensor {t.tensor.name}: expected at most {max_size} a shard, found {t.bytes} bytes"
            for t in plan.tensors
            if t.bytes > limit
        )


def kv_cache_bytes(header: Header, context: int) -> int:
    """Bytes of keys and values in F16 for so many tokens, as a file's own numbers say; 0 where they do not say it."""
    told = {k.removeprefix(f"{header.architecture}."): v for k, v in header.metadata.items()}
    layers, heads = told.get("block_count", 0), told.get("attention.head_count", 0)
    if rank := told.get(
        "attention.kv_lora_rank"
    ):  # latent attention keeps one vector for all heads
        width = rank + told.get("rope.dimension_count", 0)
    else:
        wide = told.get("embedding_length", 0) // heads if heads else 0
        kv_heads = told.get("attention.head_count_kv", heads)
        width = kv_heads * (
            told.get("attention.key_length", wide) + told.get("attention.value_length", wide)
        )
    return int(2 * layers * width * context)
