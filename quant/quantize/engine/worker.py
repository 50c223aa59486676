"""The process of a run: ``python -m quant.quantize.engine.worker JOB.json``. ggml may end it, and nobody else with it.

What is wrong with the input or the result goes into ``failure.json`` beside the job; anything else is a traceback in the
log that the parent quotes.
"""

import json
import sys
from pathlib import Path

from quant import errors
from quant.core import files
from quant.errors import QuantError, convert_disk_errors
from quant.quantize.engine import job as jobs
from quant.quantize.engine.work import quantize_job

FAILURE = "failure.json"
KINDS = {kind.__name__: kind for kind in (errors.InputError, errors.ToolError, errors.CheckError)}


def main(path: Path) -> int:
    """Do the job; its exit code."""
    job = jobs.read_job(path)
    try:
        with convert_disk_errors(job.wanted[0].path):
            quantize_job(job, path.parent)
    except QuantError as e:
        kind = type(e).__name__
        files.write_text(
            path.with_name(FAILURE), json.dumps({"kind": kind, "problems": e.problems}) + "\n"
        )
        return 1
    return 0


def raise_failure(folder: Path) -> None:
    """Raise what the process of a job told, if it told anything."""
    try:
        told = json.loads((folder / FAILURE).read_text())
    except FileNotFoundError:
        return
    raise KINDS[told["kind"]](*told["problems"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
