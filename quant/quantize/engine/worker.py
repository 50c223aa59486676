"""The process of a run, a child program (see :mod:`quant.core.child`): ggml may abort it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.core import child
from quant.core.errors import convert_disk_errors
from quant.quantize.engine.job import parse_job
from quant.quantize.engine.work import quantize_job


def quantize_in_child(value: Mapping[str, Any], folder: Path) -> None:
    """Do the job whose JSON is ``value``."""
    job = parse_job(value)
    with convert_disk_errors(job.variants[0].path):
        quantize_job(job, folder)


if __name__ == "__main__":
    child.run_job(quantize_in_child)
