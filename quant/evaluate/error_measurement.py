"""Measure the quantization error of every type on every tensor: the error table.

A table may be published, and used again for the same model.

The error is the relative weighted MSE of a tensor: with weights w, their dequantized values q, the
imatrix's importance c of each column, and the fraction v of tokens that each expert saw,

    error = sum_e v_e sum_ij c_ej (q_eij - w_eij)^2 / sum_e v_e sum_ij c_ej w_eij^2

c_j is the mean square of column j's input, so this is the fraction of the output's energy that
becomes noise, as far as inputs are uncorrelated. With Hessians, the columns' correlation is in it
as well, and quantization is followed by GPTQ.

Of long tensors, evenly spaced rows of each expert are measured; the table has the standard error of
that sample.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.core import files
from quant.core.errors import InputError, raise_problems
from quant.llama import ggml
from quant.llama.ggml import Library, Rows
from quant.llama.gguf import TensorSpec
from quant.llama.toolchain import Toolchain
from quant.llama.types import TYPES
from quant.plan.error_table import CANDIDATES, ErrorTable, TensorError, list_possible_types
from quant.plan.plan import is_quantizable
from quant.quantize.engine.chunks import Chunk
from quant.quantize.engine.weights import ColumnImportance, WeightSource, all_finite
from quant.quantize.kernels import Kernels

if TYPE_CHECKING:
    from quant.quantize.gptq.compensator import ErrorCompensator
    from quant.quantize.gptq.hessian import Hessian

ROWS = 4096
"""Rows of a tensor that are measured: enough for a standard error of about 1 % of the error."""
MIN_ROWS = 8
"""Of each expert."""
Energies: TypeAlias = NDArray[np.float64]
"""A weighted sum of squares for each row."""


def measure_errors(
    base: Path,
    imatrix: Path | None,
    tools: Toolchain,
    *,
    types: Iterable[str] = CANDIDATES,
    rows: int = ROWS,
    jobs: int | None = None,
    hessians: Path | None = None,
) -> ErrorTable:
    """Return the error of every type on every tensor that may have it.

    Args:
        base: The BF16 file.
        imatrix: The importance of columns; None weights all columns alike, and leaves out types
            that need an imatrix.
        tools: The llama.cpp whose ggml quantizes.
        types: The types to measure.
        rows: Maximum number of rows of a tensor that are measured.
        jobs: Threads; None takes one for each core.
        hessians: Measure the error that remains after GPTQ with these Hessians; None measures
            ggml's quantization.

    Raises:
        InputError: If a weight is not finite, or the imatrix or the Hessians are of another model.
    """
    source = WeightSource.open(base)
    importance = ColumnImportance.open(imatrix) if imatrix else None
    if importance:
        raise_problems(importance.problems(source.header.tensors))
    library = ggml.load_ggml(ggml.find_library(tools.bin))
    digest = files.hash_file(base)
    meter = _ErrorMeter(
        source=source,
        importance=importance,
        library=library,
        kernels=Kernels(library),
        types=tuple(types),
        rows=rows,
        compensator=_open_compensator(hessians, digest) if hessians else None,
    )
    tensors = [t for t in source.header.tensors if is_quantizable(t)]
    # Threads, not processes: ggml and numpy release the GIL in what takes time.
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(meter.measure, tensors))
    errors = {t.name: by_type for t, (by_type, _) in zip(tensors, results, strict=True)}
    squares = {t.name: energy for t, (_, energy) in zip(tensors, results, strict=True)}
    imatrix_digest, hessians_digest = (
        files.hash_file(path) if path else None for path in (imatrix, hessians)
    )
    return ErrorTable(digest, imatrix_digest, errors, squares, hessians_digest)


def _open_compensator(hessians: Path, base_digest: str) -> "ErrorCompensator":
    # Imported late: errors of ggml's own quantization need no GPTQ.
    from quant.quantize.gptq.compensator import ErrorCompensator

    return ErrorCompensator.open(hessians, base_digest)


@dataclass(frozen=True)
class _ErrorMeter:
    """Everything that the measurement of a tensor needs."""

    source: WeightSource
    importance: ColumnImportance | None
    library: Library
    kernels: Kernels
    types: Sequence[str]
    rows: int
    compensator: "ErrorCompensator | None"

    def measure(self, tensor: TensorSpec) -> tuple[dict[str, TensorError], float]:
        """Return the error of each type, and the tensor's energy, the denominator of the error."""
        importance = self.importance
        covered = importance is not None and importance.columns(tensor, 0) is not None
        types = [
            n
            for n in list_possible_types(tensor, self.types, covered=covered)
            if n != tensor.type.name
        ]  # the type that it has already costs nothing
        visits = _read_visits(tensor, importance)
        lost: dict[str, list[Energies]] = {n: [] for n in types}
        total: list[Energies] = []
        for expert, parts in _sample_rows(tensor, self.rows):
            data = self._read(tensor, parts)
            columns = importance.columns(tensor, expert) if importance else None
            metric = self.compensator.find_hessian(tensor, expert) if self.compensator else None
            energies = _make_energies(metric, columns, float(visits[expert]))
            total.append(energies(data))
            # Each type quantizes the same rows: they are read and restored once.
            for name in types:
                # ggml gets the columns' importance without `visits`: a factor for a whole expert
                # changes its error, but not which codes are best.
                stored = self.kernels.kernel(TYPES[name])(data, columns)
                if self.compensator and metric:
                    stored = self.compensator.refine(TYPES[name], data, stored, metric)
                restored = self.library.to_float(TYPES[name], stored, tensor.shape[0])
                lost[name].append(energies(restored - data))
        energy = np.concatenate(total)
        rows = math.prod(tensor.shape[1:])
        errors = {
            name: _estimate_error(np.concatenate(parts), energy, rows)
            for name, parts in lost.items()
        }
        # The sample's energy, scaled to all rows; 6 digits are what the table keeps.
        return errors, float(f"{energy.sum() * rows / len(energy):.6g}")

    def _read(self, tensor: TensorSpec, parts: Sequence[Chunk]) -> Rows:
        """Return rows as floats, (rows, columns). Raise InputError if one is not finite."""
        raw = np.concatenate([self.source.read_rows(tensor, part) for part in parts])
        rows = self.library.to_float(tensor.type, raw, tensor.shape[0])
        if not all_finite(rows):
            raise InputError(self.source.describe_non_finite(tensor, self.library))
        return rows


def _make_energies(
    metric: "Hessian | None", columns: Rows | None, visits: float
) -> Callable[[Rows], Energies]:
    """Return the function that gives the weighted sum of squares of each row.

    Args:
        metric: The Hessian H of the tensor's input, which weights a row x by ``x H x``. Without
            one, ``sum_j c_j x_j^2``.
        columns: The importance c of each column; None is 1 for all.
        visits: The fraction of tokens that the expert saw.
    """
    weights: Any = 1.0 if columns is None else columns.astype(np.float64)

    def energies(x: Rows) -> Energies:
        sums = metric.loss(x.T) if metric else (x.astype(np.float64) ** 2 * weights).sum(1)
        return np.asarray(sums * visits, np.float64)

    return energies


def _estimate_error(lost: Energies, total: Energies, rows: int) -> TensorError:
    """Return the ratio R = sum(lost) / sum(total) over a sample of rows, and its standard error.

    It is the ratio estimator under simple random sampling without replacement (Cochran, Sampling
    Techniques, 1977, chapter 6): with n of N rows,

        se^2 = (1 - n/N) n / (n - 1) sum (lost_i - R total_i)^2 / sum(total)^2

    Evenly spaced rows are no random sample, but rows of a weight matrix have no order that would
    matter.
    """
    energy = total.sum()
    # A tensor of zeros, or inputs that were always zero: there is nothing to lose.
    if not energy:
        return TensorError(0.0, 0.0)
    error, n = lost.sum() / energy, len(lost)
    squares = ((lost - error * total) ** 2).sum()
    # If all rows were measured, 1 - n/N is 0: there is no error of sampling.
    deviation = np.sqrt(max(1 - n / rows, 0) * squares * n / max(n - 1, 1)) / energy
    return TensorError(float(f"{error:.6g}"), float(f"{deviation:.3g}"))


def _sample_rows(tensor: TensorSpec, rows: int) -> Iterator[tuple[int, list[Chunk]]]:
    """Yield the rows of each expert that are measured: all, or single ones evenly spaced."""
    expert_rows, experts = tensor.shape[1], math.prod(tensor.shape[2:])
    count = min(max(rows // experts, MIN_ROWS), expert_rows)
    for expert in range(experts):
        first = expert * expert_rows
        if count == expert_rows:
            yield expert, [Chunk(0, expert, first, expert_rows)]
        else:
            # Without chance: two machines measure the same rows.
            starts = (first + n * expert_rows // count for n in range(count))
            yield expert, [Chunk(n, expert, start, 1) for n, start in enumerate(starts)]


def _read_visits(tensor: TensorSpec, importance: ColumnImportance | None) -> NDArray[np.float64]:
    """Return the fraction of tokens that each expert saw; equal ones without counts."""
    experts = math.prod(tensor.shape[2:])
    entry = importance.entries.get(tensor.name) if importance else None
    if importance is None or entry is None or entry.counts.elements != experts:
        return np.full(experts, 1 / experts)
    start = importance.header.data_start + entry.counts.offset
    raw = importance.file.read(start, 4 * experts, tensor.name).view(np.float32)
    # An expert without tokens counts as one token: its weights are in the file and may be needed.
    visits: NDArray[np.float64] = np.maximum(raw.astype(np.float64), 1)
    visits /= visits.sum()
    return visits
