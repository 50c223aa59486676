"""Make the files of a job in a process of its own, and say what they are. The engine's public verb."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant import files, ongoing, toolchain
from quant.engine import job as jobs
from quant.engine import slots
from quant.engine.job import Job
from quant.engine.output import finished, record_path
from quant.engine.worker import FAILURE, raise_failure
from quant.errors import ToolError, disk_errors

JOB, LOG = "job.json", "log"


def run(job: Job, folder: Path) -> Mapping[Path, Mapping[str, Any]]:
    """The wanted variants, each with what is said of it; those that stand already are not made again.

    ``folder`` is for the job, its log and what is in work. Raises InputError for what is wrong with the weights, the
    imatrix or the disk, CheckFailed for a wrong result, and ToolError with the tensors in work when ggml ends the process.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        todo = tuple(w for w in job.wanted if not finished(w.path, job.identity))
        if todo:
            _start(Job(**{**vars(job), "wanted": todo}), folder)
    return {w.path: json.loads(record_path(w.path).read_text()) for w in job.wanted}


def _start(job: Job, folder: Path) -> None:
    files.remove(folder / FAILURE)
    jobs.write(folder / JOB, job)
    try:
        toolchain.run(
            [sys.executable, "-m", "quant.engine.worker", folder / JOB],
            cwd=folder, log=folder / LOG, env=_environment(), name="the quantiser",
            meanwhile=lambda: ongoing.tell(slots.share(folder / slots.SHARE)),
        )  # fmt: skip
    except ToolError as e:
        raise_failure(folder)
        in_work = slots.read(folder / slots.NAME)
        raise ToolError(*e.problems, *(f"in work was tensor {what}" for what in in_work)) from e


def _environment() -> dict[str, str]:
    """The environment, without ggml's own debugger and with a numpy that starts no threads."""
    return os.environ | {"GGML_NO_BACKTRACE": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
