"""Every way this project stops on purpose, each with the exit code that scripts see.

QuantError
├── InputError      2   a file, a field, the call or the machine is not as the work needs it
│   └── ToolError   2   a native tool is missing, too old, or gave up; its last words are quoted
├── CheckFailed     1   what was made is not what was planned, or does not talk
└── Unreachable     1   the hub does not answer, or not to the end; the same command continues

The library raises, the command line prints: one line a problem, no traceback. A run that is stopped from outside ends
with 3, and the same command continues it.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class QuantError(Exception):
    """Something that the person at the keyboard can act on."""

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class InputError(QuantError):
    """The input, the call or the machine is wrong: nothing was started, or nothing was kept."""

    exit_code = 2


class ToolError(InputError):
    """A native tool is missing, too old, or ended with an error."""


class CheckError(QuantError):
    """A finished piece of work is not what it had to be."""


class Unreachable(QuantError):  # noqa: N818 - it reads as what happened
    """The hub does not answer, or not to the end: nothing is wrong here, and it may be over in a while."""


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one :class:`InputError` with every problem in it; nothing happens when there is none."""
    if found := tuple(problems):
        raise InputError(*found)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: its neighbour, or all that there are."""
    names = sorted(known)
    close = get_close_matches(name.lower(), {n.lower(): n for n in names}, n=1, cutoff=0.5)
    if close:
        return f"did you mean {next(n for n in names if n.lower() == close[0])!r}?"
    return f"known are {', '.join(names)}"


_NO_ROOM = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file grew too large",
}


@contextmanager
def convert_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder under ``path`` into an :class:`InputError` that names it."""
    try:
        yield
    except OSError as e:
        if e.errno in _NO_ROOM:
            raise InputError(
                f"{e.filename or path}: {_NO_ROOM[e.errno]}; free some and run again"
            ) from e
        if isinstance(e, PermissionError) or e.errno == errno.EROFS:
            raise InputError(f"{e.filename or path}: cannot be written ({e.strerror})") from e
        raise
