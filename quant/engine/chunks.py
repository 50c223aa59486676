"""The work of a run in pieces: some rows of one tensor, never of two experts, the longest first. Pure."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from quant.ggml_types import GGMLType
from quant.header import TensorSpec

CHUNK_WEIGHTS = 2**20
"""Weights in a piece, about: seconds at most for one type, megabytes of memory."""

COST = {
    "F32": 2, "BF16": 2, "F16": 2, "TQ1_0": 3, "Q8_0": 4, "TQ2_0": 8, "MXFP4": 14, "Q6_K": 30, "Q4_0": 27, "Q5_0": 33,
    "Q3_K": 35, "Q4_1": 90, "Q5_1": 95, "Q4_K": 90, "Q5_K": 95, "Q2_K": 105, "IQ1_S": 140, "IQ1_M": 140, "IQ4_NL": 170,
    "IQ4_XS": 170, "IQ2_S": 180, "IQ3_S": 260, "IQ2_XXS": 285, "IQ3_XXS": 380, "IQ2_XS": 520,
}  # fmt: skip
"""Milliseconds of one core for 2**20 weights, with an imatrix, as measured; only their order matters."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of one tensor."""

    no: int
    """Counts the pieces of its tensor."""
    expert: int
    first_row: int
    """Counted through all experts."""
    rows: int


def chunks(tensor: TensorSpec) -> tuple[Chunk, ...]:
    """The pieces of a tensor, in the order of its rows; each row is in one of them."""
    expert_rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = max(CHUNK_WEIGHTS // tensor.shape[0], 1)
    found: list[Chunk] = []
    for expert in range(math.prod(tensor.shape[2:])):
        for row in range(0, expert_rows, step):
            found.append(
                Chunk(len(found), expert, expert * expert_rows + row, min(step, expert_rows - row))
            )  # fmt: skip
    return tuple(found)


def cost(weights: int, types: Iterable[GGMLType]) -> float:
    """How long that many weights take, in milliseconds of one core."""
    return sum(COST.get(t.name, max(COST.values())) for t in types) * weights / 2**20


@dataclass(frozen=True)
class Piece:
    """What one thread does in one go: read the rows once, write them in every type that is wanted."""

    tensor: TensorSpec
    chunk: Chunk
    types: tuple[GGMLType, ...]

    @property
    def cost(self) -> float:
        """How long it takes, in milliseconds of one core."""
        return cost(self.chunk.rows * self.tensor.shape[0], self.types)


def longest_first(pieces: Collection[Piece]) -> list[Piece]:
    """The order in which threads take them, so that none is alone with a long one at the end.

    Among equals the order is that of the file, so that reading goes forward.
    """
    return sorted(pieces, key=lambda p: (-p.cost, p.tensor.offset, p.chunk.no))
