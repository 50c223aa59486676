"""Which tensors the threads of a run work on, in a small file that outlives the process.

When ggml aborts the process, the parent reads from it which tensors were in work.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A tensor's name has at most 63 bytes (GGML_MAX_NAME), so name and type fit.
LINE_BYTES = 128
IN_WORK = "in-work"
"""Name of the file in the folder of the job."""


class WorkStatus:
    """A file with one line of fixed length for each thread: the tensor it works on."""

    def __init__(self, path: Path) -> None:
        """Create the file, or empty it."""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    @contextmanager
    def show(self, thread: int, subject: str) -> Iterator[None]:
        """Show ``subject`` in the thread's line while the block runs.

        An error leaves the line as it is. So does the end of the process, and then the line counts.
        """
        self._write(thread, subject)
        yield
        self._write(thread, "")

    def _write(self, thread: int, subject: str) -> None:
        # One pwrite at a fixed offset: no lock, and nothing is buffered when the process aborts.
        line = subject.encode()[:LINE_BYTES].ljust(LINE_BYTES)
        os.pwrite(self.fd, line, thread * LINE_BYTES)


def read_in_work(path: Path) -> tuple[str, ...]:
    """Return what the threads were working on, without repeats; nothing if the file is missing."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    lines = (data[i : i + LINE_BYTES] for i in range(0, len(data), LINE_BYTES))
    subjects = (line.strip(b" \0").decode(errors="replace") for line in lines)
    return tuple(dict.fromkeys(subject for subject in subjects if subject))
