"""The quantization error of a chunk: some of its rows, read back and compared with the original."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quant.llama.ggml import Bytes, Library, Rows
from quant.llama.types import GGMLType
from quant.quantize.engine.journal import ErrorSums

if TYPE_CHECKING:
    from quant.quantize.gptq.hessian import Hessian

SAMPLED_ROWS = 8
"""Rows of a chunk that are compared. All rows would take as long as the fast kernels."""


@dataclass(frozen=True)
class RowSample:
    """Evenly spaced rows of a chunk, with which every type's error is measured."""

    rows: int
    """Rows of the whole chunk."""
    step: int
    """Distance from one sampled row to the next."""
    values: NDArray[np.float64]
    """The original weights, of shape (sampled rows, row)."""
    weights: NDArray[np.float64] | float
    """The weight of each column's squared error, as the kernel gets it from the imatrix."""
    signal: float
    """The weighted sum of squares of the values."""
    hessian: "Hessian | None" = None
    """If known, the error is e H eᵀ instead, and the column weights are not used."""

    @classmethod
    def take(
        cls, rows: Rows, columns: Rows | None, hessian: "Hessian | None" = None
    ) -> "RowSample":
        """Return a sample of the rows of a chunk.

        Args:
            rows: The original weights, of shape (rows, row).
            columns: The imatrix data of the columns, of shape (row,).
            hessian: The Hessian of the chunk's expert.
        """
        step = -(-len(rows) // SAMPLED_ROWS)  # rounded up: at most SAMPLED_ROWS rows
        values = rows[::step].astype(np.float64)
        if hessian:
            weights: NDArray[np.float64] | float = 1.0
            signal = float(hessian.loss(rows[::step].T).sum(dtype=np.float64))
        else:
            weights = 1.0 if columns is None else columns.astype(np.float64)
            signal = float((values * values * weights).sum())
        return cls(
            rows=len(rows),
            step=step,
            values=values,
            weights=weights,
            signal=signal,
            hessian=hessian,
        )

    def measure_error(self, library: Library, ggml_type: GGMLType, data: Bytes) -> ErrorSums:
        """Return the error of the sampled rows; ``data`` is the whole chunk as it is stored."""
        stored = np.ascontiguousarray(data.reshape(self.rows, -1)[:: self.step]).reshape(-1)
        values = library.to_float(ggml_type, stored, self.values.shape[1])
        error = np.subtract(values, self.values)
        if self.hessian:
            loss = self.hessian.loss(error.T.astype(np.float32)).sum(dtype=np.float64)
            return ErrorSums(float(loss), self.signal)
        np.multiply(error, error, out=error)
        return ErrorSums(float((error.sum(0) * self.weights).sum()), self.signal)
