"""Add up Hessians in memory, and write the file: shared by the two programs that read a text.

A chunk's rows are multiplied in single precision and added up in single precision. Double would
take twice the memory, which is what limits this work. The rounding errors of a thousand sums (one
in a million) are far below what another text would change.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.calibration.hessian_file import COUNTS, METADATA_KEY
from quant.core.errors import ToolError
from quant.llama.model import Numbers

TINY = 1e-300
"""Divisor instead of zero, for experts without rows."""
MatrixSizes = Mapping[str, tuple[int, int]]
"""Number of experts, and of columns, by name of the weight matrix."""


class HessianSums:
    """Running sums of w x xᵀ by matrix and expert, with weights w."""

    def __init__(self, sizes: MatrixSizes) -> None:
        # The kernel gives memory to pages that are written, so experts without rows take none.
        self.products = {
            name: np.zeros((experts, n, n), np.float32) for name, (experts, n) in sizes.items()
        }
        self.counts = {name: np.zeros(experts, np.int64) for name, (experts, _) in sizes.items()}
        # Σ w and Σ w² of each expert's rows.
        self.weights = {name: np.zeros(experts) for name, (experts, _) in sizes.items()}
        self.squares = {name: np.zeros(experts) for name, (experts, _) in sizes.items()}

    def add(self, name: str, expert: int, rows: Numbers, weights: Numbers | None = None) -> None:
        """Add rows that go into one expert of a matrix.

        Args:
            name: The matrix.
            expert: The expert; 0 for a matrix without experts.
            rows: Inputs, (rows, columns).
            weights: The weight of each row, (rows,). None weighs all rows alike.

        Raises:
            ToolError: An input is NaN or infinite.
        """
        if not len(rows):
            return
        # (sqrt(w) x)(sqrt(w) x)ᵀ = w x xᵀ, so one symmetric product serves both cases.
        rows = rows if weights is None else rows * np.sqrt(weights)[:, None]
        product = rows.T @ rows
        # One bad input makes a diagonal element bad, so the trace checks all of them.
        if not np.isfinite(product.trace()):
            raise ToolError(f"{name}: its inputs are NaN or infinite: the model is broken")
        self.products[name][expert] += product
        self.counts[name][expert] += len(rows)
        if weights is None:
            self.weights[name][expert] += len(rows)
            self.squares[name][expert] += len(rows)
        else:
            self.weights[name][expert] += weights.sum(dtype=np.float64)
            self.squares[name][expert] += np.square(weights, dtype=np.float64).sum()

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of the Hessian file. Matrices without rows are left out.

        Weights are scaled to a mean of one over all experts of a matrix, so an expert whose rows
        matter more keeps a larger Hessian. Its count is Kish's effective sample size
        (Σ w)² / Σ w²: the number of equally weighted rows with as much information.
        """
        tensors: dict[str, NDArray[Any]] = {}
        for name, products in self.products.items():
            weights, rows = self.weights[name], self.counts[name]
            if not weights.any():
                continue
            sizes = np.floor(weights**2 / np.maximum(self.squares[name], TINY)).astype(np.int64)
            # The file's mean is sum / count. To make it Σ w x xᵀ / (rows · mean weight), the sum
            # is scaled by the count that the file has over the rows that were added.
            scale = sizes / np.maximum(rows, 1) * (rows.sum() / weights.sum())
            if (scale != 1).any():
                # In place: memory for a second copy need not exist. The totals are set to what
                # the scaled sums stand for, so that a second call scales by one.
                products *= scale.astype(np.float32)[:, None, None]
                self.counts[name] = sizes
                self.weights[name], self.squares[name] = sizes.astype(float), sizes.astype(float)
            tensors |= {name: products if len(rows) > 1 else products[0], name + COUNTS: sizes}
        return tensors


def write_hessians(sums: HessianSums, job: Mapping[str, Any], chunks: int) -> None:
    """Write the file that a job asks for, with its origin and the chunks that were read."""
    from safetensors.numpy import save_file

    about = json.dumps({**job["about"], "chunks": chunks}, sort_keys=True)
    save_file(sums.tensors(), job["out"], {METADATA_KEY: about})
