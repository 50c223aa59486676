"""The command line, called in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command with arguments: its exit code, its standard output, its standard error."""

    def go(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quant", *map(str, arguments)])
        code = cli._run()
        out, err = capsys.readouterr()
        return code, out, err

    return go
