"""What each type does to each tensor: the error database, which is measured once for a model and may be published.

An error is relative: the squares of what was lost over the squares of what was there, each weighted by the importance of
its column, and experts by how often they were visited. So it is the share of a tensor's output that turned to noise.
Of long tensors some rows of every expert are taken, evenly; then the standard error tells how far the rest may be.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quant import files, ggml
from quant.engine.chunks import Chunk
from quant.engine.weights import COUNTS, Matrix, Source, finite
from quant.errors import InputError, refuse
from quant.ggml import Library, Rows
from quant.ggml_types import TYPES
from quant.header import TensorSpec
from quant.kernels import Kernels
from quant.plan import quantizable
from quant.toolchain import Toolchain

if TYPE_CHECKING:
    from quant.feedback.descent import Metric
    from quant.feedback.refiner import Refiner

FORM = "quant-distortion-1"
"""First thing in such a file."""
ROWS = 4096
"""Of a tensor that are measured; a sample of so many is exact to about a hundredth."""
FEWEST_ROWS = 8
"""Of each expert."""
CANDIDATES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K",
    "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
"""Types that an allocation chooses from, unless others are named."""


@dataclass(frozen=True)
class Error:
    """What one type does to one tensor."""

    share: float
    """Of the weighted squares, lost."""
    deviation: float
    """Standard error of that share; 0 where all rows were measured."""


@dataclass(frozen=True)
class Distortions:
    """The error database of one model and one importance matrix."""

    base: str
    """The sha256 of the BF16 file."""
    matrix: str | None
    """The sha256 of the imatrix."""
    errors: Mapping[str, Mapping[str, Error]]
    """By tensor and type; only types that the tensor may have."""
    squares: Mapping[str, float]
    """By tensor, the weighted squares that were there: shares times these are losses that can be added."""
    moments: str | None = None
    """The sha256 of the second moments by which rounding was fed back; none where it was not."""

    def only(self, types: Iterable[str]) -> "Distortions":
        """Without the other types."""
        wanted = frozenset(types)
        errors = {name: {k: e for k, e in by_type.items() if k in wanted} for name, by_type in self.errors.items()}
        return replace(self, errors=errors)

    def json(self) -> dict[str, Any]:
        """As it is written."""
        tensors = {
            name: {
                "squares": self.squares[name],
                "errors": {kind: [e.share, e.deviation] for kind, e in errors.items()},
            }
            for name, errors in self.errors.items()
        }
        seen = {"moments": self.moments} if self.moments else {}
        return {"form": FORM, "base": self.base, "imatrix": self.matrix, **seen, "tensors": tensors}


def measure(
    base: Path, matrix: Path | None, tools: Toolchain, *, types: Iterable[str] = CANDIDATES, rows: int = ROWS,
    jobs: int | None = None, moments: Path | None = None,
) -> Distortions:  # fmt: skip
    """The error of every type on every tensor that may have it; with moments, that which is left when rounding is fed back.

    Raises InputError for weights that are no numbers, and for an imatrix of another model.
    """
    source, importance = Source.open(base), Matrix.open(matrix) if matrix else None
    if importance:
        refuse(importance.problems(source.header.tensors))
    library = ggml.load(ggml.find(tools.bin))
    kernels = Kernels(library)
    digest = files.digest(base)
    refiner = _refiner(moments, digest) if moments else None
    tensors = [t for t in source.header.tensors if quantizable(t)]
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        found = list(
            pool.map(lambda t: _errors(t, source, importance, library, kernels, tuple(types), rows, refiner), tensors)
        )
    errors = {t.name: by_type for t, (by_type, _) in zip(tensors, found, strict=True)}
    squares = {t.name: whole for t, (_, whole) in zip(tensors, found, strict=True)}
    matrix_digest, seen = (files.digest(path) if path else None for path in (matrix, moments))
    return Distortions(digest, matrix_digest, errors, squares, seen)


def possible(tensor: TensorSpec, types: Iterable[str], *, covered: bool) -> Iterator[str]:
    """The types that a tensor may have: its rows fill their blocks, and those that need importance have it."""
    yield from (n for n in types if TYPES[n].fits(tensor.shape[0]) and (covered or not TYPES[n].needs_imatrix))


def write(path: Path, found: Distortions) -> None:
    """Write the database."""
    files.write_text(path, json.dumps(found.json(), indent=1) + "\n")


def read(path: Path, base: str | None = None) -> Distortions:
    """A database that was written before. Raises InputError for another file, and for another model's."""
    try:
        told = json.loads(path.read_text())
        if told["form"] != FORM:
            raise ValueError(f"form {told['form']!r}")
        tensors = told["tensors"].items()
        errors = {name: {kind: Error(*e) for kind, e in t["errors"].items()} for name, t in tensors}
        squares = {name: float(t["squares"]) for name, t in tensors}
        found = Distortions(told["base"], told["imatrix"], errors, squares, told.get("moments"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: expected an error database ({FORM}), found something else ({e})") from e
    if base and found.base != base:
        raise InputError(f"{path}: of another model: its base is {found.base[:12]}…, this one is {base[:12]}…")
    return found


def _refiner(moments: Path, base_digest: str) -> "Refiner":
    from quant.feedback.refiner import Refiner  # errors of ggml's bytes are measured without it

    return Refiner.open(moments, base_digest)


def check_feedback(path: Path, measured: str | None, moments: Path | None) -> None:
    """Raise InputError for a file that was measured with other moments than those, or with some where there are none."""
    wanted = files.digest(moments) if moments else None
    if measured != wanted:
        expected, found = (
            f"fed back by moments {d[:12]}…" if d else "with ggml's rounding" for d in (wanted, measured)
        )
        raise InputError(
            f"{path}: expected what was measured {expected}, found {found}; name another file, or take it away"
        )


def _errors(
    tensor: TensorSpec, source: Source, matrix: Matrix | None, library: Library, kernels: Kernels,
    types: Sequence[str], rows: int, refiner: "Refiner | None",
) -> tuple[dict[str, Error], float]:  # fmt: skip
    """By type, and the weighted squares of the whole tensor."""
    covered = matrix is not None and matrix.columns(tensor, 0) is not None
    wanted = [n for n in possible(tensor, types, covered=covered) if n != tensor.type.name]
    visits = _visits(tensor, matrix)
    lost: dict[str, list[NDArray[np.float64]]] = {n: [] for n in wanted}
    there: list[NDArray[np.float64]] = []
    for expert, parts in _sample(tensor, rows):
        data = _rows(tensor, source, library, parts)
        columns = matrix.columns(tensor, expert) if matrix else None
        metric = refiner.metric(tensor, expert) if refiner else None
        weights = 1.0 if columns is None else columns.astype(np.float64)

        def lengths(
            error: Rows, metric: "Metric | None" = metric, weights: Any = weights, often: float = float(visits[expert])
        ) -> NDArray[np.float64]:
            found = metric.loss(error.T) if metric else (error.astype(np.float64) ** 2 * weights).sum(1)
            return np.asarray(found * often, np.float64)

        there.append(lengths(data))
        for name in wanted:
            stored = kernels.kernel(TYPES[name])(data, columns)
            if refiner and metric:
                stored = refiner.refine(TYPES[name], data, stored, metric)
            lost[name].append(lengths(library.to_float(TYPES[name], stored, tensor.shape[0]) - data))
    whole = np.concatenate(there)
    every = math.prod(tensor.shape[1:])
    squares = float(f"{whole.sum() * every / len(whole):.6g}")
    return {name: _share(np.concatenate(parts), whole, every) for name, parts in lost.items()}, squares


def _share(lost: NDArray[np.float64], whole: NDArray[np.float64], rows: int) -> Error:
    """The ratio of two sums over a sample of rows, and its standard error (of a ratio estimator, without return)."""
    total = whole.sum()
    if not total:
        return Error(0.0, 0.0)
    share, n = lost.sum() / total, len(lost)
    spread = np.sqrt(max(1 - n / rows, 0) * ((lost - share * whole) ** 2).sum() * n / max(n - 1, 1)) / total
    return Error(float(f"{share:.6g}"), float(f"{spread:.3g}"))


def _sample(tensor: TensorSpec, rows: int) -> Iterator[tuple[int, list[Chunk]]]:
    """For every expert the rows that are measured: all, or single ones evenly apart."""
    expert_rows, experts = tensor.shape[1], math.prod(tensor.shape[2:])
    each = min(max(rows // experts, FEWEST_ROWS), expert_rows)
    for expert in range(experts):
        first = expert * expert_rows
        if each == expert_rows:
            yield expert, [Chunk(0, expert, first, expert_rows)]
        else:
            yield expert, [Chunk(n, expert, first + n * expert_rows // each, 1) for n in range(each)]


def _rows(tensor: TensorSpec, source: Source, library: Library, parts: Sequence[Chunk]) -> Rows:
    raw = np.concatenate([source.raw(tensor, part) for part in parts])
    rows = library.to_float(tensor.type, raw, tensor.shape[0])
    if not finite(rows):
        raise InputError(source.non_finite(tensor, library))
    return rows


def _visits(tensor: TensorSpec, matrix: Matrix | None) -> NDArray[np.float64]:
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
