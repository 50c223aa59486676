"""Show the progress of a build on standard error: a bar on a terminal, else a line a stage."""

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
"""How often a line reports a stage that takes long."""


def print_line(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class LineProgress:
    """Runs stages and prints a line when each is done: for logs, where a bar would be noise."""

    total: int
    done: int = field(default=0, init=False)

    def __call__(self, stage: str, subject: str, work: Callable[[], T]) -> T:
        """Run one stage, print how long it took, and return its result."""
        width = len(str(self.total))
        began = last_line = time.monotonic()

        def show(fraction: float) -> None:
            nonlocal last_line
            if (now := time.monotonic()) - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                left = format_fraction(fraction, now - began)
                # Nine letters: `calibrate`, the longest name of a stage.
                print_line(f"{'':>{2 * width + 3}} {stage:<9} {subject}  {left}")

        with listen_to_progress(show):
            result = work()
        self.done += 1
        seconds = time.monotonic() - began
        print_line(f"[{self.done:>{width}}/{self.total}] {stage:<9} {subject}  {seconds:.1f} s")
        return result


@dataclass
class BarProgress:
    """Runs stages behind a bar that names the current one."""

    progress: Progress
    total: int

    def __post_init__(self) -> None:
        self.task = self.progress.add_task("", total=self.total)

    def __call__(self, stage: str, subject: str, work: Callable[[], T]) -> T:
        """Run one stage with its name beside the bar, and return its result."""
        began = time.monotonic()

        def show(fraction: float) -> None:
            about = format_fraction(fraction, time.monotonic() - began)
            self.progress.update(self.task, description=f"{stage} {subject}  {about}")

        self.progress.update(self.task, description=f"{stage} {subject}")
        with listen_to_progress(show):
            result = work()
        self.progress.advance(self.task)
        return result


def format_fraction(fraction: float, seconds: float) -> str:
    """Return a fraction as percent, and the time left, after so many seconds: "25 %, 1:30 left"."""
    if not fraction:
        return "0 %"
    # As if the rest went on at the mean speed so far.
    left = round(seconds / fraction - seconds)
    hours, minutes = divmod(left // 60, 60)
    clock = f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"
    return f"{100 * fraction:.0f} %, {clock} left"


@contextmanager
def show_progress(total: int) -> Iterator[LineProgress | BarProgress]:
    """Yield a runner for so many stages: a bar on a terminal, else lines.

    The library's log is shown while the block runs.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        # A log file or CI gets one line for each event: a bar is redrawn with control characters.
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
        # Lines of the log go through the bar's console, which redraws the bar below them.
        Progress(*columns, console=console, transient=True) as progress,
        show_log(progress.console.print),
    ):
        yield BarProgress(progress, total)


@contextmanager
def show_log(write: Callable[[str], object] = print_line) -> Iterator[None]:
    """Print what the library logs while the block runs."""
    log, handler = logging.getLogger("quant"), _LogPrinter(write)
    level = log.level
    log.addHandler(handler)
    # Python's default level is WARNING: without this the handler gets no INFO.
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _LogPrinter(logging.Handler):
    """Prints each log record as a plain line."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.getMessage())
