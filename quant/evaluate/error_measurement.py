"""What each type does to each tensor: the error database, which is measured once for a model and may be published.

An error is relative: the squares of what was lost over the squares of what was there, each weighted by the importance of
its column, and experts by how often they were visited. So it is the share of a tensor's output that turned to noise.
Of long tensors some rows of every expert are taken, evenly; then the standard error tells how far the rest may be.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quant.core import files
from quant.errors import InputError, raise_problems
from quant.llama import ggml
from quant.llama.ggml import Library, Rows
from quant.llama.gguf import TensorSpec
from quant.llama.toolchain import Toolchain
from quant.llama.types import TYPES
from quant.plan.error_table import CANDIDATES, ErrorTable, TensorError, list_possible_types
from quant.plan.plan import is_quantizable
from quant.quantize.engine.chunks import Chunk
from quant.quantize.engine.weights import COUNTS, ColumnImportance, WeightSource, finite
from quant.quantize.kernels import Kernels

if TYPE_CHECKING:
    from quant.quantize.gptq.descent import Metric
    from quant.quantize.gptq.refiner import ErrorCompensator

ROWS = 4096
"""Of a tensor that are measured; a sample of so many is exact to about a hundredth."""
FEWEST_ROWS = 8
"""Of each expert."""


def measure_errors(
    base: Path,
    matrix: Path | None,
    tools: Toolchain,
    *,
    types: Iterable[str] = CANDIDATES,
    rows: int = ROWS,
    jobs: int | None = None,
    moments: Path | None = None,
) -> ErrorTable:
    """The error of every type on every tensor that may have it; with moments, that which is left when rounding is fed back.

    Raises InputError for weights that are no numbers, and for an imatrix of another model.
    """
    source, importance = WeightSource.open(base), ColumnImportance.open(matrix) if matrix else None
    if importance:
        raise_problems(importance.problems(source.header.tensors))
    library = ggml.load_ggml(ggml.find_library(tools.bin))
    kernels = Kernels(library)
    digest = files.hash_file(base)
    refiner = _refiner(moments, digest) if moments else None
    tensors = [t for t in source.header.tensors if is_quantizable(t)]
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        found = list(
            pool.map(
                lambda t: _errors(
                    t, source, importance, library, kernels, tuple(types), rows, refiner
                ),
                tensors,
            )
        )
    errors = {t.name: by_type for t, (by_type, _) in zip(tensors, found, strict=True)}
    squares = {t.name: whole for t, (_, whole) in zip(tensors, found, strict=True)}
    matrix_digest, seen = (files.hash_file(path) if path else None for path in (matrix, moments))
    return ErrorTable(digest, matrix_digest, errors, squares, seen)


def _refiner(moments: Path, base_digest: str) -> "ErrorCompensator":
    from quant.quantize.gptq.refiner import (
        ErrorCompensator,  # errors of ggml's bytes are measured without it
    )

    return ErrorCompensator.open(moments, base_digest)


def _errors(
    tensor: TensorSpec,
    source: WeightSource,
    matrix: ColumnImportance | None,
    library: Library,
    kernels: Kernels,
    types: Sequence[str],
    rows: int,
    refiner: "ErrorCompensator | None",
) -> tuple[dict[str, TensorError], float]:
    """By type, and the weighted squares of the whole tensor."""
    covered = matrix is not None and matrix.columns(tensor, 0) is not None
    wanted = [
        n for n in list_possible_types(tensor, types, covered=covered) if n != tensor.type.name
    ]
    visits = _visits(tensor, matrix)
    lost: dict[str, list[NDArray[np.float64]]] = {n: [] for n in wanted}
    there: list[NDArray[np.float64]] = []
    for expert, parts in _sample(tensor, rows):
        data = _rows(tensor, source, library, parts)
        columns = matrix.columns(tensor, expert) if matrix else None
        metric = refiner.metric(tensor, expert) if refiner else None
        weights = 1.0 if columns is None else columns.astype(np.float64)

        def lengths(
            error: Rows,
            metric: "Metric | None" = metric,
            weights: Any = weights,
            often: float = float(visits[expert]),
        ) -> NDArray[np.float64]:
            found = (
                metric.loss(error.T) if metric else (error.astype(np.float64) ** 2 * weights).sum(1)
            )
            return np.asarray(found * often, np.float64)

        there.append(lengths(data))
        for name in wanted:
            stored = kernels.kernel(TYPES[name])(data, columns)
            if refiner and metric:
                stored = refiner.refine(TYPES[name], data, stored, metric)
            lost[name].append(
                lengths(library.to_float(TYPES[name], stored, tensor.shape[0]) - data)
            )
    whole = np.concatenate(there)
    every = math.prod(tensor.shape[1:])
    squares = float(f"{whole.sum() * every / len(whole):.6g}")
    return {
        name: _share(np.concatenate(parts), whole, every) for name, parts in lost.items()
    }, squares


def _share(lost: NDArray[np.float64], whole: NDArray[np.float64], rows: int) -> TensorError:
    """The ratio of two sums over a sample of rows, and its standard error (of a ratio estimator, without return)."""
    total = whole.sum()
    if not total:
        return TensorError(0.0, 0.0)
    share, n = lost.sum() / total, len(lost)
    spread = (
        np.sqrt(max(1 - n / rows, 0) * ((lost - share * whole) ** 2).sum() * n / max(n - 1, 1))
        / total
    )
    return TensorError(float(f"{share:.6g}"), float(f"{spread:.3g}"))


def _sample(tensor: TensorSpec, rows: int) -> Iterator[tuple[int, list[Chunk]]]:
    """For every expert the rows that are measured: all, or single ones evenly apart."""
    expert_rows, experts = tensor.shape[1], math.prod(tensor.shape[2:])
    each = min(max(rows // experts, FEWEST_ROWS), expert_rows)
    for expert in range(experts):
        first = expert * expert_rows
        if each == expert_rows:
            yield expert, [Chunk(0, expert, first, expert_rows)]
        else:
            yield (
                expert,
                [Chunk(n, expert, first + n * expert_rows // each, 1) for n in range(each)],
            )


def _rows(
    tensor: TensorSpec, source: WeightSource, library: Library, parts: Sequence[Chunk]
) -> Rows:
    raw = np.concatenate([source.raw(tensor, part) for part in parts])
    rows = library.to_float(tensor.type, raw, tensor.shape[0])
    if not finite(rows):
        raise InputError(source.non_finite(tensor, library))
    return rows


def _visits(tensor: TensorSpec, matrix: ColumnImportance | None) -> NDArray[np.float64]:
    """How often each expert was visited, as a share; alike where nobody counted."""
    experts = math.prod(tensor.shape[2:])
    counts = matrix.header.by_name.get(tensor.name + COUNTS) if matrix else None
    if matrix is None or counts is None or counts.elements != experts:
        return np.full(experts, 1 / experts)
    start = matrix.header.data_start + counts.offset
    found = matrix.file.read(start, 4 * experts, tensor.name).view(np.float32).astype(np.float64)
    visits: NDArray[np.float64] = np.maximum(found, 1)
    visits /= visits.sum()
    return visits
