"""Run other programs with a log, and end them when this process ends.

Every command goes to a log in a form that can be pasted into a shell. A program dies with the
process that started it, so a killed run leaves nothing behind that still writes.
"""

import ctypes
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quant.core.disk import find_write_problem
from quant.core.errors import InputError, ToolError

LOG_TAIL_LINES = 12
"""Lines of a failed program's log that the error quotes."""
LOG_HEADING = "; end of the log:\n"
"""What stands in an error between the reason and the quoted lines."""
POLL_SECONDS = 1.0
"""How often ``meanwhile`` is called."""
STOP_SECONDS = 5.0
"""What a program gets to end after SIGTERM, before SIGKILL."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Loaded here, and not between fork and exec: the loader's lock may be held by another thread at the
# fork, and would never be released in the child.
_LIBC = ctypes.CDLL(None)


def run_program(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    log: Path,
    env: Mapping[str, str] | None = None,
    name: str | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run one program to its end.

    Args:
        command: The program and its arguments. No shell is involved.
        cwd: Its working directory.
        log: The file that its command and its output are appended to.
        env: Its environment. None passes on this process's.
        name: What errors call it. None takes the file name of the program.
        meanwhile: Called every second while it runs. If it raises, the program is ended.

    Raises:
        ToolError: The program cannot be started, or failed; the end of its log is quoted.
        InputError: The program failed on a full disk. Most programs do not say so themselves.
    """
    name = name or Path(command[0]).name
    with open_log(command, log) as out:
        process = start_process(command, cwd, out, env)
        try:
            while (code := _wait(process, POLL_SECONDS if meanwhile else None)) is None:
                assert meanwhile
                meanwhile()
        finally:
            stop_process(process)
    if code and (reason := find_write_problem(cwd)):
        raise InputError(f"{cwd}: {name} stopped: {reason}; free some and run again")
    if code:
        raise ToolError(f"{name} {describe_exit(code)}{quote_log_tail(log)}")


def quote_log_tail(log: Path) -> str:
    """Return the heading and the last lines of a log, to be put behind the reason of an error."""
    return LOG_HEADING + read_log_tail(log)


def read_log_tail(log: Path) -> str:
    """Return the last lines of a log, indented for an error message. Empty lines are left out."""
    # errors=replace: llama.cpp prints tokens, which may be parts of a UTF-8 character.
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:]) or "    (nothing)"


def describe_exit(code: int) -> str:
    """Return a return code in words: "exited with 1", or the name of the signal that ended it."""
    if code >= 0:
        return f"exited with {code}"
    name = signal.Signals(-code).name
    # The kernel's OOM killer sends SIGKILL, and so may a user: hence the question mark.
    hints = {"SIGKILL": " (out of memory?)", "SIGXFSZ": " (a file grew too large)"}
    return f"was ended by {name}{hints.get(name, '')}"


def find_free_port(port: int | None = None) -> int:
    """Return a TCP port on 127.0.0.1 that nothing listens on.

    Args:
        port: The port that must be free. None lets the kernel choose one.

    Raises:
        InputError: The port is taken, or is no port.
    """
    with socket.socket() as s:
        # Connections of the last server stay in TIME_WAIT for a minute and must not block its port.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port or 0))
        except (OSError, OverflowError) as e:
            raise InputError(
                f"port {port}: expected a free port on 127.0.0.1, found it taken ({e});"
                " give another"
            ) from e
        # Another process may take the port before the server binds it. The server then ends, and
        # its log says why.
        return int(s.getsockname()[1])


@contextmanager
def open_log(command: Sequence[str | Path], log: Path) -> Iterator[int]:
    """Append a command to a log and yield the log's file descriptor for the program's output."""
    # A descriptor and not a file object: without a buffer the command stands before the output.
    # O_APPEND, because a retry and the program's own children write to the same log.
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
    env: Mapping[str, str] | None = None,
    group: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program that is killed when this process dies.

    Args:
        command: The program and its arguments.
        cwd: Its working directory.
        out: The file descriptor for its standard output and standard error.
        env: Its environment. None passes on this process's.
        group: Make it the leader of a process group, which the terminal's Ctrl-C does not reach.

    Raises:
        ToolError: It does not exist, or is no program for this machine.
    """
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
    """Ask the kernel to kill this process when its parent dies, even of ``kill -9``.

    For ``preexec_fn``: runs in the child before the program replaces it.
    """
    # No handler of the parent can do this: SIGKILL runs none. The parent is the thread that forked
    # (prctl(2)), so a program must be started from a thread that outlives it.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_process(process: subprocess.Popen[bytes], group: bool = False) -> None:
    """End a process that may still run: SIGTERM, then SIGKILL after five seconds.

    Args:
        process: The process. Nothing happens if it has ended already.
        group: Also kill whatever is left of its process group.
    """
    try:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        if group:  # in `finally`: a second interrupt may end the wait above
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], seconds: float | None) -> int | None:
    """Return a process's exit code, or None if it still runs after so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
