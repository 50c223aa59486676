"""Waiting for processes, and looking whether they live."""

import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_SECONDS = 120
"""A busy machine starts a program late; a test that hangs ends all the same."""


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Come back when the condition holds; fail when it does not for too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def written_pid(path: Path) -> int:
    """The number of a process that writes it to a file when it has begun."""
    wait_for(lambda: path.exists() and path.read_text().strip())
    return int(path.read_text())


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended and was not asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
