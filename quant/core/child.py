"""One protocol for this project's own child programs: a job as JSON in, an outcome as JSON out.

Work that native code may end, or that must not share this process's memory, token or libraries,
runs in a child program: a module that is started as ``python -m MODULE JOB OUTCOME``. Its last
lines are ``if __name__ == "__main__": child.run_job(entry)``, and its parent calls
:func:`run_child`. Four files lie in the folder of the work:

- ``job.json``: what the parent wants, any JSON object;
- ``outcome.json``: ``{"result": ...}``, or ``{"error": CLASS, "problems": [...]}``;
- ``progress``: the fraction done, if the program reports it (:mod:`quant.core.progress`);
- ``log``: the command and everything that the program printed.

A QuantError that is raised in the child is raised again in the parent, with its class and all its
problems. A child that ends without an outcome has crashed; the error quotes the end of its log.

Three programs send more than that, each for a reason. The downloader's progress is the bytes in
its folder, because a transfer that hangs reports nothing. The quantizer's threads write what is in
work to a mapped file, which is still there when ggml aborts. The template sandbox writes each
rendered text as one line of JSON as soon as it has it: a kernel limit may end the process at any
text, and the texts before it are still valid.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from quant.core import errors, files, process, progress
from quant.core.errors import QuantError, ToolError
from quant.core.format import to_pretty_json

JOB, OUTCOME, PROGRESS, LOG = "job.json", "outcome.json", "progress", "log"

Entry: TypeAlias = Callable[[dict[str, Any], Path], Any]
"""Does a job in its folder and returns a result that JSON can hold."""


class CrashError(ToolError):
    """A child program ended without an outcome."""


def write_job(program: str, job: Mapping[str, Any], folder: Path) -> list[str | Path]:
    """Write a job and return the command that does it.

    Args:
        program: The child program's module, such as ``quant.evaluate.scorer``.
        job: What to do. Paths are written as text.
        folder: The folder of the work; it must exist.
    """
    files.write_text(folder / JOB, json.dumps(job, indent=2, default=str) + "\n")
    return [sys.executable, "-m", program, folder / JOB, folder / OUTCOME]


def run_child(
    program: str,
    job: Mapping[str, Any],
    *,
    folder: Path,
    name: str,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Any:
    """Run a child program to its end and return its result.

    The job and the outcome are removed when the program succeeds, and stay for inspection when it
    fails. The log always stays.

    Args:
        program: The child program's module.
        job: What to do, as :func:`write_job` takes it.
        folder: The folder of the work, and the program's working directory.
        name: What errors call the program, such as "the converter".
        env: The program's environment. None passes on this process's.
        meanwhile: Called every second while the program runs. None passes its progress on.

    Returns:
        What the program's entry returned.

    Raises:
        QuantError: Whatever the program raised, by class. A ToolError quotes the end of the log if
            the program printed anything, because native libraries explain themselves there.
        CrashError: The program ended without an outcome: a signal, a lack of memory, a traceback.
        InputError: The disk is full.
    """
    # An interrupted run may have left them. Its outcome would be read as this run's if the program
    # crashes.
    for left in (OUTCOME, PROGRESS):
        files.remove(folder / left)
    command = write_job(program, job, folder)
    try:
        process.run_program(
            command,
            cwd=folder,
            log=folder / LOG,
            env=env,
            name=name,
            meanwhile=meanwhile or (lambda: _pass_progress_on(folder / PROGRESS)),
        )
    except ToolError as e:
        # run_job ends with 0 for its own errors too, so any other exit code is a crash.
        raise CrashError(*e.problems) from e
    result = _read_outcome(folder, name)
    for done in (JOB, OUTCOME, PROGRESS):
        files.remove(folder / done)
    return result


def run_job(entry: Entry) -> NoReturn:
    """Do the job that the command line names, write its outcome, and end this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # An interrupt is the parent's to report; a traceback of ours would only fill the log.
        signal.signal(number, signal.SIG_DFL)
    job_path, outcome_path = map(Path, sys.argv[-2:])
    folder = job_path.parent
    outcome: dict[str, Any]
    try:
        with progress.listen_to_progress(lambda done: _write_progress(folder / PROGRESS, done)):
            outcome = {"result": entry(json.loads(job_path.read_text()), folder)}
    except QuantError as e:
        outcome = {"error": _find_class(e), "problems": e.problems}
    # Atomic: the parent reads a whole outcome or none, even if this process is killed here.
    files.write_text(outcome_path, to_pretty_json(outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: the hub client's threads and the teardown of native libraries could otherwise keep
    # or kill a process whose work is done.
    os._exit(0)


def _read_outcome(folder: Path, name: str) -> Any:
    """Return the result, or raise the error that the outcome holds."""
    try:
        outcome = json.loads((folder / OUTCOME).read_text())
    except FileNotFoundError:
        tail = _quote_log(folder / LOG) or ""
        raise CrashError(f"{name} ended without an outcome{tail}") from None
    if "error" not in outcome:
        return outcome["result"]
    kind: type[QuantError] = getattr(errors, outcome["error"])
    *others, last = outcome["problems"]
    quote = _quote_log(folder / LOG) if issubclass(kind, ToolError) else ""
    raise kind(*others, last + quote)


def _find_class(e: QuantError) -> str:
    """Return the name of an error's class, or of its nearest base in :mod:`quant.core.errors`."""
    names = [c.__name__ for c in type(e).__mro__ if getattr(errors, c.__name__, None) is c]
    return str(names[0])


def _quote_log(log: Path) -> str:
    """Return the end of a log for an error, or nothing if the program printed nothing."""
    text = log.read_text(errors="replace") if log.exists() else ""
    if all(line.startswith("$ ") for line in text.splitlines() if line.strip()):
        return ""  # only the command
    return process.quote_log_tail(log)


def _write_progress(path: Path, done: float) -> None:
    # Not atomic and not flushed: it is written often, and a reader that finds half of it skips it.
    path.write_text(f"{done:.6f}")


def _pass_progress_on(path: Path) -> None:
    with suppress(FileNotFoundError, ValueError):
        progress.report_progress(float(path.read_text()))
