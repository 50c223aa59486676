"""What a run says while it works: the tensors that its threads have in work, and how much of all is done.

It stands in small files, which outlive the process: who finds it dead can name the tensors.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLOT_BYTES = 128
NAME, SHARE = "in-work", "share"


class Slots:
    """A line of fixed length for every thread."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    @contextmanager
    def working(self, thread: int, what: str) -> Iterator[None]:
        """While the block runs, the thread has this in work."""
        self._put(thread, what)
        yield
        self._put(thread, "")

    def _put(self, thread: int, what: str) -> None:
        os.pwrite(self.fd, what.encode()[:SLOT_BYTES].ljust(SLOT_BYTES), thread * SLOT_BYTES)


def read_slots(path: Path) -> tuple[str, ...]:
    """What was in work, each thing once; nothing where there is no such file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    lines = (data[at : at + SLOT_BYTES] for at in range(0, len(data), SLOT_BYTES))
    return tuple(
        dict.fromkeys(
            text for line in lines if (text := line.strip(b" \0").decode(errors="replace"))
        )
    )


def report_slots(path: Path, share: float) -> None:
    """So much of the work is done, from 0 to 1."""
    path.write_text(f"{share:.4f}\n")


def done_fraction(path: Path) -> float:
    """How much is done; nothing where that was not told yet."""
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0.0
