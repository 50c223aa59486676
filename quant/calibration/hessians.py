"""Compute the Hessians of a model's weight matrices over a calibration text.

The Hessian of a matrix is H = Σ x xᵀ over the rows x that go into it. Error compensation (GPTQ)
uses it to correct the rounding error of one column in the columns that are rounded after it.

There are two ways. Without gradients llama.cpp runs the model forward, and all tokens count alike
(:mod:`quant.calibration.hessian_collector`). With gradients the model runs forward and backward,
and each token is weighted by what an error there does to the output
(:mod:`quant.calibration.gradients`). Both run in a child program.
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
from quant.calibration.hessian_sums import MatrixSizes
from quant.calibration.text import CalibrationText
from quant.core import child, files, memory
from quant.core.disk import find_space_problem
from quant.core.errors import InputError, convert_disk_errors, raise_problems
from quant.core.files import Receipt
from quant.core.store import Store
from quant.llama.gguf import Header, TensorSpec, read_headers
from quant.llama.model import bindings_version
from quant.llama.model_file import ModelFile
from quant.llama.tensors import OUTPUT, TOKEN_EMBEDDING, split_block
from quant.llama.types import FLOATS
from quant.plan.plan import find_coverable, is_quantizable
from quant.plan.recipe import ModelRecipe

log = logging.getLogger(__name__)
STAGE, FILE = "moments", "moments.safetensors"
"""Former name of Hessians; stores and scripts know the stage by it."""
FLOAT_BYTES = 4
LOGIT_ARRAYS = 4
"""Arrays of the size of a chunk's logits that a thread holds at once: logits, softmax, gradient,
and the product's own."""


@dataclass(frozen=True)
class HessianSettings:
    """How the text is read, and for which matrices."""

    context: int = 512
    """Tokens in a chunk."""
    chunks: int | None = None
    """Maximum number of chunks. None reads the whole text."""
    threads: int = 2
    only: str | None = None
    """Regular expression that the full name of a matrix has to match. None takes all."""
    gradients: bool | None = None
    """Weight rows by gradients. None does so if the model can be run backward."""


@dataclass(frozen=True)
class HessianResult:
    """The Hessian file of a build."""

    path: Path
    receipt: Receipt


@dataclass(frozen=True)
class _MemoryNeed:
    """Bytes of memory that the child program takes."""

    sums: int
    """The Hessians, until the end. The file takes as much disk."""
    fixed: int
    per_thread: int

    @property
    def least(self) -> int:
        """With one thread."""
        return self.sums + self.fixed + self.per_thread


def compute_hessians(
    base: ModelFile, text: CalibrationText, model: ModelRecipe, store: Store
) -> HessianResult:
    """Compute the Hessians of a model over its calibration text, or take them from the store.

    The text is read as far as the importance matrix reads it at first.

    Args:
        base: The BF16 model.
        text: Its calibration text.
        model: The recipe, with context and chunks.
        store: Keeps the file.

    Raises:
        InputError, ToolError: As :func:`collect_hessians`.
    """
    settings = HessianSettings(
        context=model.imatrix.context,
        chunks=model.imatrix.chunks,
        # Not os.cpu_count(): it counts cores that a cpuset (container, taskset) withholds, too.
        threads=len(os.sched_getaffinity(0)),
    )
    inputs: dict[str, Any] = {
        "base": base.digest,
        "text": text.receipt.sha256,
        "context": settings.context,
        "chunks": settings.chunks,
        "llama.cpp": bindings_version(),
    }
    if not [*_find_backward_problems(base.headers)]:
        # No such key for other models: a new revision of gradients must not invalidate their files.
        inputs |= {"gradients": REVISION}

    def make(partial: Path) -> Mapping[str, Any]:
        hessians = collect_hessians(base.path, text.path, partial / FILE, settings)
        return {"matrices": len(hessians.counts)}

    result = store.run_once(STAGE, inputs, make)
    return HessianResult(result.path(FILE), result.receipt(FILE))


def collect_hessians(
    base: Path, text: Path, out: Path, settings: HessianSettings | None = None
) -> Hessians:
    """Write a Hessian file.

    Args:
        base: The model: a BF16 GGUF file, or the first shard of several.
        text: The text to read.
        out: The file to write. It appears whole or not at all.
        settings: How the text is read, and for which matrices.

    Returns:
        The open file.

    Raises:
        InputError: There is too little memory or disk; the text fills no chunk; no matrix matches;
            or gradients are asked for and the model cannot be run backward.
        ToolError: The model's activations are NaN or infinite.
    """
    settings = settings or HessianSettings()
    headers = read_headers(base)
    tensors = [t for h in headers for t in h.tensors]
    backward = _decide_backward(base, headers, settings)
    sizes = _select_matrices(base, tensors, settings.only, embedding=backward)
    need = _estimate_memory(tensors, sizes, settings.context, backward=backward)
    raise_problems(_find_resource_problems(out, need))
    log.info(
        "hessians: %d matrices take %s bytes of memory, and as many of disk",
        len(sizes),
        f"{need.sums:,}",
    )
    about = _describe_origin(base, text, settings, backward=backward)
    with convert_disk_errors(out), files.temp_folder(out) as folder:
        part = folder / out.name
        job = {
            "model": str(base.resolve()),
            "text": str(text.resolve()),
            "out": str(part),
            "matrices": sizes,
            "about": about,
            "context": settings.context,
            "threads": _choose_threads(settings.threads, need) if backward else settings.threads,
            "chunks": settings.chunks,
        }
        if not _run_program(job, folder, backward=backward):
            raise InputError(
                f"{text}: expected at least one chunk of {settings.context} tokens, found fewer"
                " tokens; give it more text, or a shorter --context"
            )
        shutil.copymode(folder / child.LOG, part)  # safetensors writes with mode 0600
        files.replace_atomically(part, out)
    return Hessians.open(out, about["base"])


def _run_program(job: Mapping[str, Any], folder: Path, *, backward: bool) -> int:
    """Run the child program and return the number of chunks that it read."""
    # One BLAS thread: idle threads of OpenBLAS spin while they wait, and take the cores from
    # llama.cpp's threads. With more of them the whole took twice as long.
    single = {"OPENBLAS_NUM_THREADS": "1"} | ({"OMP_NUM_THREADS": "1"} if backward else {})
    # On an abort ggml starts gdb or lldb for a backtrace (ggml.c: ggml_print_backtrace).
    chunks: int = child.run_child(
        "quant.calibration.gradients.program"
        if backward
        else "quant.calibration.hessian_collector",
        job,
        folder=folder,
        name="reading the text",
        env=os.environ | single | {"GGML_NO_BACKTRACE": "1"},
    )
    return chunks


def _describe_origin(
    base: Path, text: Path, settings: HessianSettings, *, backward: bool
) -> dict[str, Any]:
    """Return the metadata of the file. The program adds the number of chunks."""
    about: dict[str, Any] = {
        "form": FORM,
        "context": settings.context,
        "llama.cpp": bindings_version(),
    }
    if backward:
        about |= {"gradients": REVISION}
    try:
        about |= {"text": files.hash_file(text), "base": ModelFile.open(base.resolve()).digest}
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read ({e.strerror})") from e
    return about


# ---- which matrices, and with gradients or without


def _select_matrices(
    base: Path, tensors: Collection[TensorSpec], only: str | None, *, embedding: bool
) -> MatrixSizes:
    """Return the matrices that can be quantized and that the model runs through.

    These are the matrices of the trunk's blocks, and the output. A model without an output tensor
    uses its token embedding. Otherwise the embedding is a lookup without inputs, of which only
    gradients say anything (``embedding``).
    """
    names = {t.name for t in tensors}
    reached = (
        find_coverable(tensors)
        | {OUTPUT if OUTPUT in names else TOKEN_EMBEDDING}
        | ({TOKEN_EMBEDDING} if embedding else set())
    )
    available = [t for t in tensors if t.name in reached and is_quantizable(t)]
    selected = _match_names(available, only) if only is not None else available
    if not selected:
        example = f", as {available[0].name} is" if available else ""
        raise InputError(
            f"{base}: expected matrices{f' called {only!r}' if only else ''}{example}, found none"
        )
    return {t.name: (prod(t.shape[2:]), t.shape[0]) for t in selected}


def _match_names(tensors: Collection[TensorSpec], only: str) -> list[TensorSpec]:
    try:
        pattern = re.compile(only)
    except re.error as e:
        raise InputError(f"--only: expected a regular expression, found {only!r} ({e})") from e
    return [t for t in tensors if pattern.fullmatch(t.name)]


def _decide_backward(base: Path, headers: Sequence[Header], settings: HessianSettings) -> bool:
    """Return whether the model is run backward. Raise InputError if it should be and cannot."""
    problems = [*_find_backward_problems(headers)]
    backward = not problems if settings.gradients is None else settings.gradients
    if backward:
        raise_problems(
            f"{base}: {problem}; with --no-gradients all tokens count alike" for problem in problems
        )
    elif settings.gradients is None and headers[0].architecture in ARCHITECTURES:
        # The user may expect gradients here. For other architectures none are to be expected.
        log.warning("hessians: %s: all tokens count alike", problems[0])
    return backward


def _find_backward_problems(headers: Sequence[Header]) -> Iterator[str]:
    """Yield everything for which a model cannot be run backward."""
    tensors = [t for h in headers for t in h.tensors]
    yield from find_shape_problems(headers[0].metadata, {t.name for t in tensors})
    if other := [t for t in tensors if t.type.name not in FLOATS]:
        yield (
            f"{other[0].name}: expected {', '.join(FLOATS)}, found {other[0].type.name}, and so"
            f" {len(other)} tensors"
        )


# ---- memory and disk


def _estimate_memory(
    tensors: Collection[TensorSpec], sizes: MatrixSizes, context: int, *, backward: bool
) -> _MemoryNeed:
    """Estimate the child program's memory beside what llama.cpp maps."""
    sums = FLOAT_BYTES * sum(experts * n * n for experts, n in sizes.values())
    product = FLOAT_BYTES * max(n * n for _, n in sizes.values())  # of a chunk's rows
    if not backward:
        return _MemoryNeed(sums, 0, product)
    # Weights are converted to F32 one block at a time; outside of the blocks, one tensor.
    elements: dict[int | str, int] = {}
    for t in tensors:
        block = split_block(t.name)[0]
        key = t.name if block is None else block
        elements[key] = elements.get(key, 0) + t.elements
    vocabulary = next(t.shape[1] for t in tensors if t.name == TOKEN_EMBEDDING)
    logits = FLOAT_BYTES * context * vocabulary
    return _MemoryNeed(sums, FLOAT_BYTES * max(elements.values()), LOGIT_ARRAYS * logits + product)


def _find_resource_problems(out: Path, need: _MemoryNeed) -> Iterator[str]:
    """Yield why this machine has too little memory or disk."""
    advice = "take some tensors at a time with --only REGEX"
    if (free := memory.measure_free_memory()) < need.least:
        yield f"hessians: expected {need.least:,} bytes of memory, found {free:,} free; {advice}"
    problem = find_space_problem(
        out, need.sums, purpose=" on its disk", advice=f"{advice}, or free some"
    )
    if problem:
        yield problem


def _choose_threads(wanted: int, need: _MemoryNeed) -> int:
    """Return as many threads as there is memory for, at least one.

    Free memory is measured again: it may have changed since the check.
    """
    free = memory.measure_free_memory() - need.sums - need.fixed
    return min(wanted, max(1, free // need.per_thread))
