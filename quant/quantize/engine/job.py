"""What a run is told, as one JSON that its process reads; and everything that can be wrong with it before work starts."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.disk import find_space_problem
from quant.core.format import GIB
from quant.llama.gguf import ALIGNMENT, TensorSpec
from quant.llama.types import FLOATS, TYPES
from quant.quantize.engine.layout import FileLayout
from quant.quantize.engine.output import WrittenFile
from quant.quantize.engine.reuse import FinishedFile
from quant.quantize.engine.weights import ColumnImportance, WeightSource

RESERVE_BYTES = 64 * 2**20
"""Room that is left on the disk beside the planned files."""


@dataclass(frozen=True)
class TypeRequest:
    """One variant that is to be made."""

    path: Path
    """Of the whole file; shards are called after it."""
    types: Mapping[str, str]
    """The type of every tensor."""
    file_type: str
    max_bytes: int | None = None
    """Cut it into shards with at most so many bytes of tensors."""


@dataclass(frozen=True)
class EngineSettings:
    """How much of the machine a run may take; nothing here changes a byte of what it makes."""

    jobs: int | None = None
    """Kernels that run at the same time; none means one a core."""
    memory: int = GIB
    """Bytes beside the page cache."""

    @property
    def threads(self) -> int:
        """Kernels that run at the same time."""
        return self.jobs or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class EngineJob:
    """One run."""

    library: Path
    base: Path
    identity: str
    """Names the weights and the imatrix: what an interrupted run left is believed for the same ones only."""
    matrix: Path | None
    matrix_name: str
    """What the files say that it was called."""
    wanted: tuple[TypeRequest, ...]
    finished: tuple[FinishedFile, ...] = ()
    settings: EngineSettings = field(default_factory=EngineSettings)
    moments: Path | None = None
    """The second moments of the matrices' inputs: with them, rounding is fed back, and the bytes are not ggml's."""


def write_job(path: Path, job: EngineJob) -> None:
    """Write a job where its process finds it."""
    files.write_text(path, json.dumps(asdict(job), default=str) + "\n")


def read_job(path: Path) -> EngineJob:
    """The job that was written there."""
    return parse_job(json.loads(path.read_text()))


def parse_job(told: Mapping[str, Any]) -> EngineJob:
    """The job, from the JSON that it was written as."""
    wanted = tuple(
        TypeRequest(Path(w["path"]), w["types"], w["file_type"], w["max_bytes"])
        for w in told["wanted"]
    )
    finished = tuple(
        FinishedFile(
            Path(f["path"]), {name: WrittenFile(**made) for name, made in f["tensors"].items()}
        )
        for f in told["finished"]
    )
    matrix, moments = (Path(told[name]) if told[name] else None for name in ("matrix", "moments"))
    return EngineJob(
        Path(told["library"]),
        Path(told["base"]),
        told["identity"],
        matrix,
        told["matrix_name"],
        wanted,
        finished,
        EngineSettings(**told["settings"]),
        moments,
    )


def find_job_problems(
    job: EngineJob, source: WeightSource, matrix: ColumnImportance | None
) -> Iterator[str]:
    """Every reason why the job cannot be done that can be seen before it is begun, the disk left aside."""
    if (found := source.header.metadata.get("general.alignment", ALIGNMENT)) != ALIGNMENT:
        yield f"{job.base}: general.alignment: expected {ALIGNMENT}, found {found}"
    if matrix:
        yield from matrix.problems(source.header.tensors)
    for wanted in job.wanted:
        for tensor in source.header.tensors:
            problem = _type_problem(tensor, wanted.types.get(tensor.name), matrix) or _size_problem(
                tensor, wanted
            )
            if problem:
                yield f"{wanted.path.name}: tensor {tensor.name}: {problem}"


def _type_problem(
    tensor: TensorSpec, name: str | None, matrix: ColumnImportance | None
) -> str | None:
    if name not in TYPES:
        return f"expected a type of ggml, found {name}"
    kind = TYPES[name]
    if kind == tensor.type:
        return None
    if tensor.type.name not in FLOATS:
        return f"{tensor.type.name} can only be kept, found {name}"
    if not kind.fits(tensor.shape[0]):
        return (
            f"expected a row that is a multiple of {kind.block} for {name}, found {tensor.shape[0]}"
        )
    if math.prod(tensor.shape[3:]) > 1:
        return f"a tensor of four dimensions can only be kept, found {name}"
    if kind.needs_imatrix and (matrix is None or matrix.columns(tensor, 0) is None):
        return f"{name} needs imatrix data, found none for this tensor"
    return None


def _size_problem(tensor: TensorSpec, wanted: TypeRequest) -> str | None:
    size = TYPES[wanted.types[tensor.name]].bytes(tensor.elements)
    too_large = wanted.max_bytes is not None and size > wanted.max_bytes
    return (
        f"expected at most {wanted.max_bytes} bytes, a shard, found {size}" if too_large else None
    )


def room_problems(layouts: Mapping[Path, FileLayout]) -> Iterator[str]:
    """The folders that cannot hold what is still to be written."""
    needed: dict[Path, int] = {}
    for path, layout in layouts.items():
        names = layout.names(path.name.removesuffix(".gguf"))
        partials = (path.with_name(name + files.PARTIAL) for name in names)
        there = sum(p.stat().st_blocks * 512 for p in partials if p.exists())
        needed[path.parent] = needed.get(path.parent, 0) + max(layout.bytes - there, 0)
    for folder, size in needed.items():
        if problem := find_space_problem(folder, size + RESERVE_BYTES):
            yield problem
