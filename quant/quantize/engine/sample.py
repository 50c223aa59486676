"""What a type loses: a few rows of a piece are read back from what was stored, and compared with what they were."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quant.llama.ggml import Bytes, Library, Rows
from quant.llama.types import GGMLType
from quant.quantize.engine.journal import BlockSums

if TYPE_CHECKING:
    from quant.quantize.gptq.hessian import Hessian

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
    metric: "Hessian | None" = None
    """How errors of different columns add up, where that is known; then it stands for the weights."""

    @staticmethod
    def of(rows: Rows, columns: Rows | None, metric: "Hessian | None" = None) -> "Sample":
        """A few rows, evenly spread."""
        step = -(-len(rows) // SAMPLED_ROWS)
        values = rows[::step].astype(np.float64)
        if metric:
            return Sample(
                len(rows),
                step,
                values,
                1.0,
                float(metric.loss(rows[::step].T).sum(dtype=np.float64)),
                metric,
            )
        weights = 1.0 if columns is None else columns.astype(np.float64)
        return Sample(len(rows), step, values, weights, float((values * values * weights).sum()))

    def loss(self, library: Library, ggml_type: GGMLType, data: Bytes) -> BlockSums:
        """What these rows lost in a type, ``data`` being the stored rows of the whole piece."""
        stored = np.ascontiguousarray(data.reshape(self.rows, -1)[:: self.step]).reshape(-1)
        lost = np.subtract(library.to_float(ggml_type, stored, self.values.shape[1]), self.values)
        if self.metric:
            return BlockSums(
                float(self.metric.loss(lost.T.astype(np.float32)).sum(dtype=np.float64)), self.whole
            )
        np.multiply(lost, lost, out=lost)
        return BlockSums(float((lost.sum(0) * self.weights).sum()), self.whole)
