"""What a run of the engine does, as JSON for its process, and all that can be wrong with it before.

Types have their names here (``Q4_K``), because the job crosses a process boundary and the records
beside the files hold names as well. Within the engine a type is a ``GGMLType``.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.disk import find_space_problem
from quant.core.format import GIB
from quant.llama.gguf import ALIGNMENT, TensorSpec
from quant.llama.types import FLOATS, TYPES
from quant.quantize.engine.layout import FileLayout
from quant.quantize.engine.output import TensorResult
from quant.quantize.engine.reuse import ReusableFile
from quant.quantize.engine.weights import ColumnImportance, WeightSource

RESERVE_BYTES = 64 * 2**20
"""Disk space left free beside the planned files, for journals and records."""


@dataclass(frozen=True)
class VariantRequest:
    """One variant to write."""

    path: Path
    """The path of the whole file; shards are named after it."""
    types: Mapping[str, str]
    """The type of every tensor, by the tensor's name."""
    file_type: str
    """The name of llama.cpp's file type, such as Q4_K_M."""
    max_bytes: int | None = None
    """The most bytes of tensors in a shard; None writes one file."""


@dataclass(frozen=True)
class EngineSettings:
    """How much of the machine a run may use. No setting changes a byte of the result."""

    jobs: int | None = None
    """Kernels that run at the same time; None means one per core."""
    memory: int = GIB
    """Bytes of memory, the page cache not counted."""

    @property
    def threads(self) -> int:
        """Kernels that run at the same time."""
        return self.jobs or len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """One run: a base, and the variants to write from it in one pass."""

    library: Path
    """The ggml library whose bytes are written."""
    base: Path
    identity: str
    """Names the base, the imatrix and the Hessians. What an interrupted run left is continued only
    under the same identity."""
    imatrix: Path | None
    imatrix_name: str
    """The file name of the imatrix that is written into the variants."""
    variants: tuple[VariantRequest, ...]
    reusable: tuple[ReusableFile, ...] = ()
    """Files of earlier runs with the same identity, whose tensors are copied."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    hessians: Path | None = None
    """Refines rows with GPTQ; the bytes are then not llama-quantize's."""


def parse_job(value: Mapping[str, Any]) -> EngineJob:
    """Return the job from its JSON: ``dataclasses.asdict`` with paths as text."""
    imatrix, hessians = (
        Path(p) if (p := value[name]) else None for name in ("imatrix", "hessians")
    )
    return EngineJob(
        library=Path(value["library"]),
        base=Path(value["base"]),
        identity=value["identity"],
        imatrix=imatrix,
        imatrix_name=value["imatrix_name"],
        variants=tuple(VariantRequest(**v | {"path": Path(v["path"])}) for v in value["variants"]),
        reusable=tuple(parse_reusable(Path(f["path"]), f["tensors"]) for f in value["reusable"]),
        settings=EngineSettings(**value["settings"]),
        hessians=hessians,
    )


def parse_reusable(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> ReusableFile:
    """Return a reusable file from the tensors of its record."""
    return ReusableFile(path, {name: TensorResult(**t) for name, t in tensors.items()})


def find_job_problems(
    job: EngineJob, source: WeightSource, imatrix: ColumnImportance | None
) -> Iterator[str]:
    """Yield every reason why the job cannot be done, the disk aside."""
    alignment = source.header.metadata.get("general.alignment", ALIGNMENT)
    # llama-gguf-split pads tensors to 32 bytes but copies this key: the two would not agree.
    if alignment != ALIGNMENT:
        yield f"{job.base}: general.alignment: expected {ALIGNMENT}, found {alignment}"
    if imatrix:
        yield from imatrix.problems(source.header.tensors)
    for variant in job.variants:
        for tensor in source.header.tensors:
            type_problem = _find_type_problem(tensor, variant.types.get(tensor.name), imatrix)
            if problem := type_problem or _find_size_problem(tensor, variant):
                yield f"{variant.path.name}: tensor {tensor.name}: {problem}"


def _find_type_problem(
    tensor: TensorSpec, name: str | None, imatrix: ColumnImportance | None
) -> str | None:
    if name not in TYPES:
        return f"expected a type of ggml, found {name}"
    ggml_type = TYPES[name]
    if ggml_type == tensor.type:
        return None
    # llama-quantize refuses this too, unless --allow-requantize is given.
    if tensor.type.name not in FLOATS:
        return f"{tensor.type.name} can only be kept, found {name}"
    if not ggml_type.fits(tensor.shape[0]):
        return (
            f"expected a row that is a multiple of {ggml_type.block} for {name}, "
            f"found {tensor.shape[0]}"
        )
    if math.prod(tensor.shape[3:]) > 1:
        return f"a tensor of four dimensions can only be kept, found {name}"
    if ggml_type.needs_imatrix and (imatrix is None or imatrix.columns(tensor, 0) is None):
        return f"{name} needs imatrix data, found none for this tensor"
    return None


def _find_size_problem(tensor: TensorSpec, variant: VariantRequest) -> str | None:
    size = TYPES[variant.types[tensor.name]].bytes(tensor.elements)
    if variant.max_bytes is None or size <= variant.max_bytes:
        return None
    return f"expected at most {variant.max_bytes} bytes, a shard, found {size}"


def find_space_problems(layouts: Mapping[Path, FileLayout]) -> Iterator[str]:
    """Yield every folder whose disk cannot hold what is still to be written."""
    needed: dict[Path, int] = {}
    for path, layout in layouts.items():
        names = layout.file_names(path.name.removesuffix(".gguf"))
        partials = (path.with_name(name + files.PARTIAL) for name in names)
        # Partial files are sparse: only their allocated blocks are written already.
        written = sum(p.stat().st_blocks * 512 for p in partials if p.exists())
        needed[path.parent] = needed.get(path.parent, 0) + max(layout.bytes - written, 0)
    for folder, size in needed.items():
        if problem := find_space_problem(folder, size + RESERVE_BYTES):
            yield problem
