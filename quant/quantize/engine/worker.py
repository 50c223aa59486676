"""The process of a run: a child program, see :mod:`quant.core.child`. ggml may end it, and nobody else with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.core import child
from quant.errors import convert_disk_errors
from quant.quantize.engine import job as jobs
from quant.quantize.engine.work import quantize_job


def quantize_in_child(value: Mapping[str, Any], folder: Path) -> None:
    """Do the job, with what is in work in its folder."""
    job = jobs.parse_job(value)
    with convert_disk_errors(job.wanted[0].path):
        quantize_job(job, folder)


if __name__ == "__main__":
    child.run_job(quantize_in_child)
