"""Show how a build goes: a bar on a terminal, a plain line a stage elsewhere. All of it on standard error."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from quant.core.progress import listen_to_progress

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0
"""Of a stage that takes long, in a log."""


def print_line(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class LineProgress:
    """Counts stages and says a line when each is done: for logs, where a bar would be noise."""

    total: int
    done: int = field(default=0, init=False)

    def __call__(self, stage: str, subject: str, work: Callable[[], T]) -> T:
        """Do one stage and say how long it took."""
        began = told = time.monotonic()

        def hear(share: float) -> None:
            nonlocal told
            if (now := time.monotonic()) - told >= SECONDS_BETWEEN_LINES:
                told = now
                print_line(
                    f"{'':>{2 * len(str(self.total)) + 3}} {stage:<9} {subject}  {format_fraction(share, now - began)}"
                )

        with listen_to_progress(hear):
            result = work()
        self.done += 1
        print_line(
            f"[{self.done:>{len(str(self.total))}}/{self.total}] {stage:<9} {subject}  {time.monotonic() - began:.1f} s"
        )
        return result


@dataclass
class BarProgress:
    """The same as a bar with the stage that is in work."""

    progress: Progress
    total: int

    def __post_init__(self) -> None:
        self.task = self.progress.add_task("", total=self.total)

    def __call__(self, stage: str, subject: str, work: Callable[[], T]) -> T:
        """Do one stage with its name beside the bar."""
        began = time.monotonic()

        def hear(share: float) -> None:
            about = format_fraction(share, time.monotonic() - began)
            self.progress.update(self.task, description=f"{stage} {subject}  {about}")

        self.progress.update(self.task, description=f"{stage} {subject}")
        with listen_to_progress(hear):
            result = work()
        self.progress.advance(self.task)
        return result


def format_fraction(share: float, seconds: float) -> str:
    """How far a stage is that has run for some seconds, and how long it will take."""
    if not share:
        return "0 %"
    left = round(seconds / share - seconds)
    hours, minutes = divmod(left // 60, 60)
    clock = f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"
    return f"{100 * share:.0f} %, {clock} left"


@contextmanager
def show_progress(total: int) -> Iterator[LineProgress | BarProgress]:
    """What to run stages with, on this terminal or without one."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with show_log():
            yield LineProgress(total)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        Progress(*columns, console=console, transient=True) as progress,
        show_log(progress.console.print),
    ):
        yield BarProgress(progress, total)


@contextmanager
def show_log(to: Callable[[str], object] = print_line) -> Iterator[None]:
    """While the block runs, say what the library logs: how far a long stage is."""
    log, handler = logging.getLogger("quant"), _Listener(to)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _Listener(logging.Handler):
    """A line of the log as a line for people."""

    def __init__(self, to: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self.to = to

    def emit(self, record: logging.LogRecord) -> None:
        self.to(record.getMessage())
