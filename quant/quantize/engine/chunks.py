"""The work of a run in pieces: some rows of one tensor, never of two experts, the longest first. Pure."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from quant.llama.gguf import TensorSpec
from quant.llama.types import GGMLType

CHUNK_WEIGHTS = 2**20
"""Weights in a piece, about: seconds at most for one type, megabytes of memory."""

COST = {
    "F32": 2,
    "BF16": 2,
    "F16": 2,
    "TQ1_0": 3,
    "Q8_0": 4,
    "TQ2_0": 8,
    "MXFP4": 14,
    "Q6_K": 30,
    "Q4_0": 27,
    "Q5_0": 33,
    "Q3_K": 35,
    "Q4_1": 90,
    "Q5_1": 95,
    "Q4_K": 90,
    "Q5_K": 95,
    "Q2_K": 105,
    "IQ1_S": 140,
    "IQ1_M": 140,
    "IQ4_NL": 170,
    "IQ4_XS": 170,
    "IQ2_S": 180,
    "IQ3_S": 260,
    "IQ2_XXS": 285,
    "IQ3_XXS": 380,
    "IQ2_XS": 520,
}
"""Milliseconds of one core for 2**20 weights, with an imatrix, by ggml as measured; only their order matters."""

KERNEL_COST = {
    "Q4_0": 3,
    "Q5_0": 3,
    "Q6_K": 3,
    "Q3_K": 4,
    "IQ4_NL": 5,
    "IQ4_XS": 5,
    "Q4_K": 10,
    "Q5_K": 10,
    "Q2_K": 11,
    "Q4_1": 12,
    "Q5_1": 13,
    "IQ1_S": 25,
    "IQ1_M": 31,
    "IQ2_S": 38,
    "IQ2_XXS": 46,
    "IQ3_S": 54,
    "IQ2_XS": 68,
    "IQ3_XXS": 68,
}
"""The same by the project's own kernels, with AVX2; with AVX-512 it is little less."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of one tensor."""

    no: int
    """Counts the pieces of its tensor."""
    expert: int
    first_row: int
    """Counted through all experts."""
    rows: int


def split_into_chunks(tensor: TensorSpec) -> tuple[Chunk, ...]:
    """The pieces of a tensor, in the order of its rows; each row is in one of them."""
    expert_rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = max(CHUNK_WEIGHTS // tensor.shape[0], 1)
    found: list[Chunk] = []
    for expert in range(math.prod(tensor.shape[2:])):
        for row in range(0, expert_rows, step):
            found.append(
                Chunk(len(found), expert, expert * expert_rows + row, min(step, expert_rows - row))
            )
    return tuple(found)


def estimate_costs(by_ggml: Collection[str]) -> Mapping[str, int]:
    """The cost of every type, when those named are left to ggml."""
    return COST | {name: cost for name, cost in KERNEL_COST.items() if name not in by_ggml}


def estimate_cost(
    weights: int, types: Iterable[GGMLType], costs: Mapping[str, int] = COST
) -> float:
    """How long that many weights take, in milliseconds of one core."""
    return sum(costs.get(t.name, max(costs.values())) for t in types) * weights / 2**20


@dataclass(frozen=True)
class Piece:
    """What one thread does in one go: read the rows once, write them in every type that is wanted."""

    tensor: TensorSpec
    chunk: Chunk
    types: tuple[GGMLType, ...]
    costs: Mapping[str, int] = field(default_factory=lambda: COST, compare=False, repr=False)
    """What each type costs here."""

    @property
    def cost(self) -> float:
        """How long it takes, in milliseconds of one core."""
        return estimate_cost(self.chunk.rows * self.tensor.shape[0], self.types, self.costs)


def order_pieces(pieces: Collection[Piece]) -> list[Piece]:
    """The order in which threads take them, so that none is alone with a long one at the end.

    Among equals the order is that of the file, so that reading goes forward.
    """
    return sorted(pieces, key=lambda p: (-p.cost, p.tensor.offset, p.chunk.no))
