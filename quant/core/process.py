"""Run a program: the one door to child processes. Commands go to a log as they could be typed."""

import ctypes
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quant.core.disk import find_write_problem
from quant.errors import InputError, ToolError

LAST_WORDS = 12
"""Lines of a failed tool's log that the error quotes."""


LOOK_SECONDS = 1.0


_PR_SET_PDEATHSIG = 1


_LIBC = ctypes.CDLL(None)


def run_program(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    log: Path,
    env: dict[str, str] | None = None,
    name: str | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run one program to its end; raises ToolError that quotes its last words when it does not end well.

    ``meanwhile`` is called every second while it runs.
    """
    with open_log(command, log) as out:
        process = start_process(command, cwd, out, env)
        try:
            while (code := _wait(process, LOOK_SECONDS if meanwhile else None)) is None:
                assert meanwhile
                meanwhile()
        finally:
            stop_process(process)
    if code and (reason := find_write_problem(cwd)):
        raise InputError(
            f"{cwd}: {name or Path(command[0]).name} stopped: {reason}; free some and run again"
        )
    if code:
        raise ToolError(
            f"{name or Path(command[0]).name} {describe_exit(code)}; its last words:\n{read_log_tail(log)}"
        )


def read_log_tail(log: Path) -> str:
    """The end of a log, indented, for an error message."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-LAST_WORDS:]) or "    (nothing)"


def find_free_port(wanted: int | None = None) -> int:
    """A loopback port that nobody listens on; raises InputError when the wanted one is taken."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as e:
            raise InputError(
                f"port {wanted}: expected a free port on 127.0.0.1, found it taken ({e}); give another"
            ) from e
        return int(s.getsockname()[1])


@contextmanager
def open_log(command: Sequence[str | Path], log: Path) -> Iterator[int]:
    """Append the command, as it could be typed, to the log, and give the log to write to."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, f"$ {shlex.join(str(part) for part in command)}\n".encode())
        yield fd
    finally:
        os.close(fd)


def start_process(
    command: Sequence[str | Path],
    cwd: Path,
    out: int,
    env: dict[str, str] | None = None,
    group: bool = False,
) -> subprocess.Popen[bytes]:
    """A program that speaks into ``out`` and dies with this process. Raises ToolError when it is none for this machine."""
    try:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env=env,
            preexec_fn=die_with_parent,
            process_group=0 if group else None,
        )
    except OSError as e:
        raise ToolError(f"{command[0]}: cannot be started ({e})") from e


def die_with_parent() -> None:
    """In the child, before it becomes the tool: be killed when the parent dies, even of ``kill -9``."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_process(process: subprocess.Popen[bytes], group: bool = False) -> None:
    """End a child that still runs: asked first, killed after five seconds; then whatever is left of its group."""
    try:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        if group:  # also when a second interrupt comes while the first is being obeyed
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], seconds: float | None) -> int | None:
    """The exit code of a process, or none when it still runs after so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def describe_exit(code: int) -> str:
    """A return code in words; a signal by its name."""
    if code < 0:
        name = signal.Signals(-code).name
        reason = {"SIGKILL": " (out of memory?)", "SIGXFSZ": " (a file grew too large)"}.get(
            name, ""
        )
        return f"was ended by {name}{reason}"
    return f"exited with {code}"
