"""The command ``quant``: the only part that prints and that chooses exit codes."""

import os
import signal
import sys
from typing import Any, NoReturn

import click

from quant.cli import (
    allocate,
    build,
    calibration,
    evaluate,
    hessians,
    imatrix,
    inspect,
    ollama,
    plan,
    probe,
    progress,
    publish,
    smoke,
    stages,
    template,
)
from quant.cli.options import quant
from quant.core.secrets import redact_token
from quant.errors import QuantError

__all__ = [
    "allocate",
    "build",
    "calibration",
    "evaluate",
    "hessians",
    "imatrix",
    "inspect",
    "main",
    "ollama",
    "plan",
    "probe",
    "publish",
    "smoke",
    "stages",
    "template",
]
"""Importing the modules of commands is what makes the commands known."""

INTERRUPTED = 3


def main() -> NoReturn:
    """Run a command and leave with its code: 0 done, 1 a check failed, 2 wrong input, 3 interrupted."""
    for stop in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # said anew: a shell ignores the first for what runs in the background
        signal.signal(stop, _interrupted)
    code = _run()
    if code == INTERRUPTED:
        sys.stdout.flush()
        os._exit(code)  # threads of the hub's client would first end whatever they have begun
    sys.exit(code)


def _run() -> int:
    try:
        code = quant.main(
            standalone_mode=False
        )  # what a command returns, or the code that it asked click to leave with
    except click.ClickException as e:
        e.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        progress.print_line("interrupted; run the same command again to continue")
        return INTERRUPTED
    except QuantError as e:
        for problem in e.problems:
            progress.print_line(f"error: {redact_token(problem)}")
        return e.exit_code
    return code if isinstance(code, int) else 0


def _interrupted(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
