"""The work of a run: chunks of rows, and the order in which threads take them. Pure.

A chunk never spans two experts, because each expert has its own imatrix data and its own Hessian.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from quant.llama.gguf import TensorSpec
from quant.llama.types import GGMLType

CHUNK_WEIGHTS = 2**20
"""Weights of a chunk, about: at most seconds of work for one type, and megabytes of memory."""


def _parse_costs(table: str) -> dict[str, int]:
    cells = table.split()
    return {name: int(cost) for name, cost in zip(cells[::2], cells[1::2], strict=True)}


COST = _parse_costs("""
    F32 2      BF16 2     F16 2     TQ1_0 3    Q8_0 4     TQ2_0 8    MXFP4 14
    Q6_K 30    Q4_0 27    Q5_0 33   Q3_K 35    Q4_1 90    Q5_1 95    Q4_K 90
    Q5_K 95    Q2_K 105   IQ1_S 140 IQ1_M 140  IQ4_NL 170 IQ4_XS 170 IQ2_S 180
    IQ3_S 260  IQ2_XXS 285          IQ3_XXS 380           IQ2_XS 520
""")
"""Milliseconds of one core for 2**20 weights by ggml's kernels, with an imatrix.

Measured; only their order matters. See tests/benchmarks/kernels.md.
"""

KERNEL_COST = _parse_costs("""
    Q4_0 3     Q5_0 3     Q6_K 3    Q3_K 4     IQ4_NL 5   IQ4_XS 5   Q4_K 10
    Q5_K 10    Q2_K 11    Q4_1 12   Q5_1 13    IQ1_S 25   IQ1_M 31   IQ2_S 38
    IQ2_XXS 46 IQ3_S 54   IQ2_XS 68            IQ3_XXS 68
""")
"""The same by the project's kernels with AVX2. With AVX-512 it is a little less."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one expert of a tensor."""

    index: int
    """Number of the chunk within its tensor."""
    expert: int
    first_row: int
    """Counted through all experts."""
    rows: int


def split_into_chunks(tensor: TensorSpec) -> tuple[Chunk, ...]:
    """Return the chunks of a tensor in file order; each row is in exactly one of them."""
    # GGUF shapes are reversed: (row, rows of an expert, experts).
    expert_rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = max(CHUNK_WEIGHTS // tensor.shape[0], 1)
    chunks: list[Chunk] = []
    for expert in range(math.prod(tensor.shape[2:])):
        for row in range(0, expert_rows, step):
            chunks.append(
                Chunk(
                    index=len(chunks),
                    expert=expert,
                    first_row=expert * expert_rows + row,
                    rows=min(step, expert_rows - row),
                )
            )
    return tuple(chunks)


def select_costs(by_ggml: Collection[str]) -> Mapping[str, int]:
    """Return the cost of every type, where the named types are quantized by ggml's kernels."""
    return COST | {name: cost for name, cost in KERNEL_COST.items() if name not in by_ggml}


def estimate_cost(
    weights: int, types: Iterable[GGMLType], costs: Mapping[str, int] = COST
) -> float:
    """Return how long quantizing so many weights into these types takes, in ms of one core."""
    # A type that was not measured counts as the slowest, so that it is begun early.
    return sum(costs.get(t.name, max(costs.values())) for t in types) * weights / 2**20


@dataclass(frozen=True)
class WorkItem:
    """What one thread does at once: read a chunk, and write it in every type that is needed."""

    tensor: TensorSpec
    chunk: Chunk
    types: tuple[GGMLType, ...]
    costs: Mapping[str, int] = field(default_factory=lambda: COST, compare=False, repr=False)
    """The cost of each type on this machine."""

    @property
    def weights(self) -> int:
        """Weights of the chunk."""
        return self.chunk.rows * self.tensor.shape[0]

    @property
    def cost(self) -> float:
        """How long it takes, in milliseconds of one core."""
        return estimate_cost(self.weights, self.types, self.costs)


def order_work(items: Collection[WorkItem]) -> list[WorkItem]:
    """Return the items with the longest first, and equally long ones in file order.

    Longest-processing-time-first scheduling: no thread is left alone with a long item at the end.
    File order among equals lets the disk read forward.
    """
    return sorted(items, key=lambda item: (-item.cost, item.tensor.offset, item.chunk.index))
