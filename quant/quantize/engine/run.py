"""Run a job of the engine in a process of its own: the engine's public function."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quant.core import child
from quant.core.child import CrashError
from quant.core.errors import ToolError, convert_disk_errors
from quant.quantize.engine import status
from quant.quantize.engine.job import EngineJob
from quant.quantize.engine.output import record_path, recover_record


def run_engine(job: EngineJob, folder: Path) -> Mapping[Path, Mapping[str, Any]]:
    """Write the variants of a job that are not finished, and return the record of each.

    Args:
        job: What to write.
        folder: Holds the job, its log and its status file.

    Returns:
        The record of every variant, by its path: ``identity``, ``files`` and ``tensors``.

    Raises:
        InputError: The base, the imatrix, a type or the disk does not allow it.
        CheckError: A result is wrong.
        ToolError: ggml ended the process; the error names the tensors in work.
    """
    with convert_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        missing = tuple(v for v in job.variants if not recover_record(v.path, job.identity))
        if missing:
            _run_worker(replace(job, variants=missing), folder)
    # The process passes no results on: records on the disk also serve a run that was continued.
    return {v.path: json.loads(record_path(v.path).read_text()) for v in job.variants}


def _run_worker(job: EngineJob, folder: Path) -> None:
    try:
        child.run_child(
            "quant.quantize.engine.worker",
            asdict(job),
            folder=folder,
            env=_make_environment(),
            name="the quantizer",
        )
    except CrashError as e:
        in_work = status.read_in_work(folder / status.IN_WORK)
        problems = (f"in work was tensor {subject}" for subject in in_work)
        raise ToolError(*e.problems, *problems) from e


def _make_environment() -> dict[str, str]:
    # Without the backtrace ggml would start gdb on an abort. The BLAS threads would compete with
    # the engine's own, and add in another order with another number of cores.
    return os.environ | {
        "GGML_NO_BACKTRACE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
