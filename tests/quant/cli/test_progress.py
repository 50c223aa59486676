"""Progress: plain lines where nobody watches, a bar on a terminal, and results passed through."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from quant.cli import progress
from quant.cli.progress import BarProgress, LineProgress, format_fraction, print_line, show_progress
from quant.core.progress import report_progress


def fail() -> None:
    raise ValueError("stop")


def test_a_line_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("Grüße")
    assert capsys.readouterr() == ("", "Grüße\n")


def test_every_stage_is_a_numbered_line_after_it_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    do = LineProgress(12)
    for n in range(12):
        assert do("plan", f"V{n}", lambda n=n: n) == n  # type: ignore[misc]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert re.fullmatch(r"\[ 1/12\] plan +V0  \d+\.\d s", lines[0])
    assert re.fullmatch(r"\[12/12\] plan +V11  \d+\.\d s", lines[11])


def test_a_stage_that_fails_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    do = LineProgress(1)
    with pytest.raises(ValueError, match="stop"):
        do("plan", "V", fail)
    assert capsys.readouterr().err == ""
    assert do.done == 0


def bar_at(total: int) -> tuple[BarProgress, Callable[[], Any]]:
    progress_bar = Progress(console=Console(quiet=True))
    bar = BarProgress(progress_bar, total)
    return bar, lambda: progress_bar.tasks[0]


def test_a_bar_names_the_stage_and_goes_on_when_it_is_done() -> None:
    bar, task = bar_at(2)
    assert bar("plan", "V", lambda: (task().description, task().completed)) == ("plan V", 0)
    assert (task().completed, task().total) == (1, 2)
    with pytest.raises(ValueError, match="stop"):
        bar("quantize", "V", fail)
    assert task().completed == 1


@pytest.mark.parametrize(("terminal", "kind"), [(True, BarProgress), (False, LineProgress)])
def test_a_bar_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, kind: type
) -> None:
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(force_terminal=terminal, quiet=True)
    )
    with show_progress(3) as do:
        assert isinstance(do, kind)


def test_a_bar_shows_the_progress_of_a_long_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, task = bar_at(1)

    def work() -> str:
        report_progress(0.25)
        return str(task().description)

    assert re.fullmatch(r"quantize V  25 %, 0:00 left", bar("quantize", "V", work))


def test_a_long_stage_is_reported_in_a_log_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        report_progress(0.1)
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        report_progress(0.5)

    LineProgress(12)("quantize", "V", work)
    line, done = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r" {8}quantize +V  50 %, 0:00 left", line)
    assert done.startswith("[ 1/12] quantize")


@pytest.mark.parametrize(
    ("fraction", "seconds", "text"),
    [
        (0.0, 5, "0 %"),
        (0.5, 90, "50 %, 1:30 left"),
        (0.01, 100, "1 %, 2:45:00 left"),
        (1.0, 9, "100 %, 0:00 left"),
    ],
)
def test_the_time_left_is_extrapolated_from_the_fraction_done(
    fraction: float, seconds: float, text: str
) -> None:
    assert format_fraction(fraction, seconds) == text
