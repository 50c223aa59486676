"""Make the files of a job in a process of its own, and say what they are. The engine's public verb."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant.core import child, progress
from quant.core.child import CrashError
from quant.errors import ToolError, convert_disk_errors
from quant.quantize.engine import slots
from quant.quantize.engine.job import EngineJob
from quant.quantize.engine.output import read_finished, record_path


def run_engine(job: EngineJob, folder: Path) -> Mapping[Path, Mapping[str, Any]]:
    """The wanted variants, each with what is said of it; those that stand already are not made again.

    ``folder`` is for the job, its log and what is in work. Raises InputError for what is wrong with the weights, the
    imatrix or the disk, CheckFailed for a wrong result, and ToolError with the tensors in work when ggml ends the process.
    """
    with convert_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        todo = tuple(w for w in job.wanted if not read_finished(w.path, job.identity))
        if todo:
            _start(EngineJob(**{**vars(job), "wanted": todo}), folder)
    return {w.path: json.loads(record_path(w.path).read_text()) for w in job.wanted}


def _start(job: EngineJob, folder: Path) -> None:
    try:
        child.run_child(
            "quant.quantize.engine.worker",
            asdict(job),
            folder=folder,
            env=_environment(),
            name="the quantiser",
            meanwhile=lambda: progress.report_progress(slots.done_fraction(folder / slots.SHARE)),
        )
    except CrashError as e:
        in_work = slots.read_slots(folder / slots.NAME)
        raise ToolError(*e.problems, *(f"in work was tensor {what}" for what in in_work)) from e


def _environment() -> dict[str, str]:
    """The environment, without ggml's own debugger and with a numpy that starts no threads."""
    return os.environ | {
        "GGML_NO_BACKTRACE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
