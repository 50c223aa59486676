"""What a type loses: a few rows of a piece are read back from what was stored, and compared with what they were."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.engine.journal import Sums
from quant.ggml import Bytes, Library, Rows
from quant.ggml_types import GGMLType

SAMPLED_ROWS = 8
"""Rows of a piece that are compared."""


@dataclass(frozen=True)
class Sample:
    """Some rows of a piece, by which is told what each type loses."""

    rows: int
    """Of the whole piece."""
    step: int
    """Every so many rows, one is taken."""
    values: NDArray[np.float64]
    weights: NDArray[np.float64] | float
    """Of the columns, as the kernel weights them."""
    whole: float
    """The weighted squares of the values."""

    @staticmethod
    def of(rows: Rows, columns: Rows | None) -> "Sample":
        """A few rows, evenly spread."""
        step = -(-len(rows) // SAMPLED_ROWS)
        values = rows[::step].astype(np.float64)
        weights = 1.0 if columns is None else columns.astype(np.float64)
        return Sample(len(rows), step, values, weights, float((values * values * weights).sum()))

    def loss(self, library: Library, ggml_type: GGMLType, data: Bytes) -> Sums:
        """What these rows lost in a type, ``data`` being the stored rows of the whole piece."""
        stored = np.ascontiguousarray(data.reshape(self.rows, -1)[:: self.step]).reshape(-1)
        lost = np.subtract(library.to_float(ggml_type, stored, self.values.shape[1]), self.values)
        np.multiply(lost, lost, out=lost)
        return Sums(float((lost.sum(0) * self.weights).sum()), self.whole)
