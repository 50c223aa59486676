"""What a planned variant will weigh: by class of tensor, in shards, and in the memory of who runs it. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from quant.header import padded
from quant.plan import Plan

EXPERTS = re.compile(r".*_exps\.weight")
"""What `-ot ".ffn_.*_exps.=CPU"` leaves in main memory."""
GIB = 2**30


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


def classes(plan: Plan) -> tuple[ClassShare, ...]:
    """The plan by class and type, in the order in which they first stand in the file."""
    found: dict[tuple[str, str], list[int]] = {}
    for t in plan.tensors:
        found.setdefault((class_of(t.tensor.name), t.type.name), []).append(t.bytes)
    return tuple(ClassShare(name, kind, len(sizes), sum(sizes)) for (name, kind), sizes in found.items())


def class_of(name: str) -> str:
    """A tensor's name without its block and its ending."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def memory(plan: Plan, kv_bytes_per_token: int, context: int) -> Memory:
    """What running the variant takes."""
    experts = sum(t.bytes for t in plan.tensors if EXPERTS.fullmatch(t.tensor.name))
    return Memory(sum(t.bytes for t in plan.tensors), experts, kv_bytes_per_token * context)


def shard_bytes_of(plan: Plan, max_bytes: int) -> tuple[int, ...]:
    """Bytes of tensors in each shard, as llama-gguf-split cuts: in order, a new shard before the limit is passed.

    A tensor that is larger than the limit stands alone; the heads of the files come on top.
    """
    return tuple(sum(sizes) for sizes in _runs(plan, max_bytes))


def _runs(plan: Plan, max_bytes: int) -> Iterator[list[int]]:
    run: list[int] = []
    for size in (padded(t.bytes) for t in plan.tensors):
        if run and sum(run) + size > max_bytes:
            yield run
            run = []
        run.append(size)
    yield run
