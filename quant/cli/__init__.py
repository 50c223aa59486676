"""The command ``quant``: one module for each group of commands, each calling one package.

Only this package prints and chooses exit codes. ``options`` has what commands share, ``progress``
and ``tables`` what they print. Commands import the library inside their functions, so that
``quant --help`` is fast. Names of commands, options, ``--json`` keys and exit codes are used by
other people's scripts and must stay.
"""

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
from quant.core.errors import QuantError
from quant.core.secrets import redact_token

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
"""Importing a module registers its commands with the group ``quant``."""

INTERRUPTED = 3


def main() -> NoReturn:
    """Run a command and exit: 0 done, 1 a check failed, 2 wrong input, 3 interrupted."""
    # Reset the handlers: a shell starts background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    code = _run()
    if code == INTERRUPTED:
        # os._exit writes no buffers.
        sys.stdout.flush()
        # The hub client's threads would first finish every file they began.
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    try:
        # Returns what the command returned, or the code that it passed to click's exit.
        # Not standalone: there click exits by itself, with 1 for an interrupt.
        code = quant.main(standalone_mode=False)
    except click.ClickException as e:
        e.show()
        # Every error of click is wrong input, also those with another exit_code of their own.
        return 2
    except (KeyboardInterrupt, click.Abort):
        progress.print_line("interrupted; run the same command again to continue")
        return INTERRUPTED
    except QuantError as e:
        for problem in e.problems:
            # Problems quote logs of other programs, which may have printed their environment.
            progress.print_line(f"error: {redact_token(problem)}")
        return e.exit_code
    return code if isinstance(code, int) else 0


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
