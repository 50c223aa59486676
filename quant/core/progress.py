"""How far the stage in work is: whoever works may tell, whoever runs stages may listen. Neither knows the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[float], None]
"""Is told the share of the work that is done, from 0 to 1."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report_progress(share: float) -> None:
    """So much of the stage in work is done; nothing happens where nobody listens."""
    if listener := _LISTENER.get():
        listener(share)


@contextmanager
def listen_to_progress(by: Listener) -> Iterator[None]:
    """While the block runs, what is told is heard."""
    token = _LISTENER.set(by)
    try:
        yield
    finally:
        _LISTENER.reset(token)
