"""What every thread has in work, in a small file that outlives the process: who finds it dead can name the tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLOT_BYTES = 128
NAME = "in-work"


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


def read(path: Path) -> tuple[str, ...]:
    """What was in work, each thing once; nothing where there is no such file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    lines = (data[at : at + SLOT_BYTES] for at in range(0, len(data), SLOT_BYTES))
    return tuple(dict.fromkeys(text for line in lines if (text := line.strip(b" \0").decode(errors="replace"))))
