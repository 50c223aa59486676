"""How far the running stage is. The code that works reports, the code that runs stages listens.

A context variable connects them, so no function in between passes a callback on. A thread that the
work starts has a context of its own: report from the thread that runs the stage.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[float], None]
"""Gets the fraction of the work that is done, from 0 to 1."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report_progress(fraction: float) -> None:
    """Report the fraction of the running stage that is done; do nothing if nobody listens."""
    if listener := _LISTENER.get():
        listener(fraction)


@contextmanager
def listen_to_progress(listener: Listener) -> Iterator[None]:
    """Call ``listener`` with everything that is reported while the block runs."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
