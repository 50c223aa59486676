"""Every error that this project raises on purpose, each with the exit code that scripts see.

QuantError
├── InputError      2   a file, a field, the call or the machine is not as the work needs it
│   └── ToolError   2   a native tool is missing, too old, or failed; the end of its log is quoted
├── CheckError      1   the result is not what was planned, or a smoke test failed
└── Unreachable     1   the hub did not deliver; the same command continues

The library raises, the command line prints: one line for each problem, no traceback. A problem
names the file, tensor or field, what was expected, what was found, and the next step. A run that is
interrupted from outside ends with 3, and the same command continues it.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class QuantError(Exception):
    """An error that the user can act on.

    Attributes:
        problems: One line each, in the order in which they were found.
    """

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


class Unreachable(QuantError):  # noqa: N818 - a state of the hub; "UnreachableError" says no more
    """The hub does not answer, or not to the end. Nothing is wrong here, and it may pass."""


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one :class:`InputError` with all problems, or return if there are none."""
    if all_problems := tuple(problems):
        raise InputError(*all_problems)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the closest known name, or all of them."""
    names = sorted(known)
    close = get_close_matches(name.lower(), {n.lower(): n for n in names}, n=1, cutoff=0.5)
    if close:
        return f"did you mean {next(n for n in names if n.lower() == close[0])!r}?"
    return f"known are {', '.join(names)}"


_DISK_FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file grew too large",
}


@contextmanager
def convert_disk_errors(path: Path) -> Iterator[None]:
    """Convert errors of a full disk or a read-only folder into InputError while the block runs.

    Args:
        path: What the block writes. Named in the error if the OSError names no file.

    Raises:
        InputError: The disk is full, the quota is used up, or the file cannot be written.
        OSError: Any other error of the system, unchanged.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _DISK_FULL:
            raise InputError(
                f"{e.filename or path}: {_DISK_FULL[e.errno]}; free some and run again"
            ) from e
        # EROFS has no class of its own: Python makes a PermissionError of EACCES and EPERM only.
        if isinstance(e, PermissionError) or e.errno == errno.EROFS:
            raise InputError(f"{e.filename or path}: cannot be written ({e.strerror})") from e
        raise
