"""Second moments of what goes into the matrices of a model, over a calibration text: H = Σ x xᵀ, and of how many rows x.

With gradients, each row counts by what an error in what comes out of it would do to the word that the model says next; see
:mod:`quant.calibration.gradients`. Without, all count alike, and the model is only read forward, by llama.cpp.

They say how an error in one column of a matrix can be made good by the others. A file of them is kept as safetensors: a
tensor NAME of a matrix's sums (by expert where there are such), NAME.counts of the rows that were summed, and in the
metadata what it was made of. It grows with the square of a row's length, so it is read one expert at a time.
"""

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quant.calibration.gradients import ARCHITECTURES, REVISION
from quant.calibration.gradients.shape import find_shape_problems
from quant.calibration.hessian_file import FORM, Hessians
from quant.calibration.text import CalibrationText
from quant.core import child, files, memory
from quant.core.disk import find_space_problem
from quant.core.files import Receipt
from quant.core.store import Store
from quant.errors import InputError, convert_disk_errors, raise_problems
from quant.llama.gguf import Header, TensorSpec, read_headers
from quant.llama.model import bindings_version
from quant.llama.model_file import ModelFile
from quant.llama.tensors import OUTPUT, TOKEN_EMBEDDING
from quant.llama.types import FLOATS
from quant.plan.plan import find_coverable, is_quantizable
from quant.plan.recipe import ModelRecipe

log = logging.getLogger(__name__)
FLOAT_BYTES = 4
LIKE_LOGITS = 4
"""Arrays of a thread that have a number for every token and word."""
FILE = "moments.safetensors"


@dataclass(frozen=True)
class HessianSettings:
    """How the text is read, and for which matrices."""

    context: int = 512
    chunks: int | None = None
    """Of the text at most; all when not given."""
    threads: int = 2
    only: str | None = None
    """A regular expression that the whole name of a matrix matches; all matrices when not given."""
    gradients: bool | None = None
    """Whether rows count by their gradients; when not given, where the model can be read backward."""


@dataclass(frozen=True)
class HessianResult:
    """The moments of a build."""

    path: Path
    receipt: Receipt


def compute_hessians(
    base: ModelFile, text: CalibrationText, model: ModelRecipe, store: Store
) -> HessianResult:
    """The second moments of a model over its calibration text, of as many chunks as its importance matrix begins with.

    Raises InputError as :func:`observe`.
    """
    settings = HessianSettings(
        model.imatrix.context, model.imatrix.chunks, len(os.sched_getaffinity(0))
    )
    inputs: dict[str, Any] = {
        "base": base.digest,
        "text": text.receipt.sha256,
        "context": settings.context,
        "chunks": settings.chunks,
        "llama.cpp": bindings_version(),
    }
    if not [*_not_backward(read_headers(base.path))]:
        inputs |= {"gradients": REVISION}

    def make(partial: Path) -> Mapping[str, Any]:
        found = collect_hessians(base.path, text.path, partial / FILE, settings)
        return {"matrices": len(found.counts)}

    done = store.run_once("moments", inputs, make)
    return HessianResult(done.path(FILE), done.receipt(FILE))


def collect_hessians(
    base: Path, text: Path, out: Path, settings: HessianSettings | None = None
) -> Hessians:
    """Write the moments of a model over a text. Sharded files are named by their first shard.

    Raises InputError where the machine has too little memory or disk, and for a text that does not fill one chunk.
    """
    settings = settings or HessianSettings()
    headers = read_headers(base)
    tensors = [t for h in headers for t in h.tensors]
    strange = [*_not_backward(headers)]
    backward = not strange if settings.gradients is None else settings.gradients
    if backward:
        raise_problems(
            f"{base}: {problem}; with --no-gradients all tokens count alike" for problem in strange
        )
    elif settings.gradients is None and headers[0].architecture in ARCHITECTURES:
        log.warning("moments: %s: all tokens count alike", strange[0])
    matrices = _matrices(base, tensors, settings.only, embedding=backward)
    needed = FLOAT_BYTES * sum(experts * n * n for experts, n in matrices.values())
    once, each = (
        _beside(tensors, matrices, settings.context) if backward else (0, _product(matrices))
    )
    raise_problems(_no_room(out, needed, once + each))
    threads = settings.threads
    if (
        backward
    ):  # as many as there is memory for; what is free may have changed since it was looked at
        threads = min(threads, max(1, (memory.measure_free_memory() - needed - once) // each))
    log.info(
        "moments: %d matrices take %s bytes of memory, and as many of disk",
        len(matrices),
        f"{needed:,}",
    )
    about: dict[str, Any] = {
        "form": FORM,
        "context": settings.context,
        "llama.cpp": bindings_version(),
    }
    if backward:
        about |= {"gradients": REVISION}
    try:
        about |= {
            "text": files.hash_file(text),
            "base": ModelFile.open(base.resolve()).digest,
        }
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read ({e.strerror})") from e
    with convert_disk_errors(out), files.temp_folder(out) as folder:
        made = folder / out.name
        job = {
            "model": str(base.resolve()),
            "text": str(text.resolve()),
            "out": str(made),
            "matrices": matrices,
            "about": about,
            "context": settings.context,
            "threads": threads,
            "chunks": settings.chunks,
        }
        # One thread that multiplies: others that wait for work keep the cores from whoever reads; it took twice as long.
        alone = {"OPENBLAS_NUM_THREADS": "1"} | ({"OMP_NUM_THREADS": "1"} if backward else {})
        program = (
            "quant.calibration.gradients.program"
            if backward
            else "quant.calibration.hessian_collector"
        )
        chunks = child.run_child(
            program,
            job,
            folder=folder,
            name="reading the text",
            env=os.environ | alone | {"GGML_NO_BACKTRACE": "1"},
        )
        if not chunks:
            raise InputError(
                f"{text}: expected at least one chunk of {settings.context} tokens, found fewer tokens; give it more"
                " text, or a shorter --context"
            )
        shutil.copymode(folder / child.LOG, made)  # safetensors writes for its owner only
        files.replace_atomically(made, out)
    return Hessians.open(out, about["base"])


def _matrices(
    base: Path, tensors: Collection[TensorSpec], only: str | None, *, embedding: bool
) -> dict[str, tuple[int, int]]:
    """The matrices to observe: how many stand in one tensor, and how long their rows are.

    Those that a plan can quantise and that read text goes through: of the trunk's blocks, and the output. A model
    without an output of its own puts out by its embeddings. Of other embeddings only gradients know something.
    """
    names = {t.name for t in tensors}
    reach = (
        find_coverable(tensors)
        | {OUTPUT if OUTPUT in names else TOKEN_EMBEDDING}
        | ({TOKEN_EMBEDDING} if embedding else set())
    )
    there = [t for t in tensors if t.name in reach and is_quantizable(t)]
    wanted = _chosen(there, only) if only is not None else there
    if not wanted:
        example = f", as {there[0].name} is" if there else ""
        raise InputError(
            f"{base}: expected matrices{f' called {only!r}' if only else ''}{example}, found none"
        )
    return {t.name: (prod(t.shape[2:]), t.shape[0]) for t in wanted}


def _chosen(tensors: Collection[TensorSpec], only: str) -> list[TensorSpec]:
    try:
        pattern = re.compile(only)
    except re.error as e:
        raise InputError(f"--only: expected a regular expression, found {only!r} ({e})") from e
    return [t for t in tensors if pattern.fullmatch(t.name)]


def _not_backward(headers: Sequence[Header]) -> Iterator[str]:
    """All for which a model cannot be read backward."""
    tensors = [t for h in headers for t in h.tensors]
    yield from find_shape_problems(headers[0].metadata, {t.name for t in tensors})
    if other := [t for t in tensors if t.type.name not in FLOATS]:
        yield f"{other[0].name}: expected {', '.join(FLOATS)}, found {other[0].type.name}, and so {len(other)} tensors"


def _product(matrices: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of the largest product of a chunk's rows."""
    return FLOAT_BYTES * max(n * n for _, n in matrices.values())


def _beside(
    tensors: Collection[TensorSpec], matrices: Mapping[str, tuple[int, int]], context: int
) -> tuple[int, int]:
    """Bytes beside the sums, to read backward: a block's weights, or the output's; and for each thread what it says."""
    by_block: dict[str, int] = {}
    for t in tensors:
        block = t.name.split(".")[1] if t.name.startswith("blk.") else t.name
        by_block[block] = by_block.get(block, 0) + t.elements
    words = next(t.shape[1] for t in tensors if t.name == TOKEN_EMBEDDING)
    return FLOAT_BYTES * max(
        by_block.values()
    ), FLOAT_BYTES * LIKE_LOGITS * context * words + _product(matrices)


def _no_room(out: Path, needed: int, beside: int) -> Iterator[str]:
    """Why this machine cannot do it: sums are held until the end, and something comes to them."""
    help_ = "take some tensors at a time with --only REGEX"
    if (free := memory.measure_free_memory()) < needed + beside:
        yield f"moments: expected {needed + beside:,} bytes of memory, found {free:,} free; {help_}"
    advice = f"{help_}, or free some"
    if problem := find_space_problem(out, needed, purpose=" on its disk", advice=advice):
        yield problem
