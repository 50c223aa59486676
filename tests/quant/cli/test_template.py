"""`quant template`: what it prints and with which code it ends."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant import cli
from quant.header import read_header
from tests.gguf_files import LLAMA, key, write
from tests.quant.test_template import ORIGINAL, PATCHED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command with arguments: its exit code, its standard output, its standard error."""

    def go(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quant", "template", *map(str, arguments)])
        try:
            code = cli._run()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return go


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", keys=[*LLAMA, key("tokenizer.chat_template", ORIGINAL)])


def test_patch_says_what_was_written(run: Run, gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.gguf"
    code, printed, said = run("patch", gguf, "-o", out)
    assert (code, printed) == (0, "")
    assert said.startswith(f"{out}: tokenizer.chat_template patched by glm-4.6, sha256 ")
    assert read_header(out).metadata["tokenizer.chat_template"] == PATCHED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.gguf"], "nowhere.gguf: cannot be read"),
        (["bare.gguf"], "bare.gguf: tokenizer.chat_template: missing"),
        (["other.gguf"], "found none"),
        (["other.gguf", "--patch", "glm-4.6"], "found it 0 times"),
        (["model.gguf", "--patch", "glm-46"], "did you mean 'glm-4.6'?"),
        (["m-00001-of-00002.gguf"], "m-00002-of-00002.gguf: missing"),
    ],
)
def test_what_is_wrong_with_the_input_is_said_and_ends_with_2(
    arguments: list[str], words: str, run: Run, gguf: Path, tmp_path: Path
) -> None:
    write(tmp_path / "bare.gguf")
    write(tmp_path / "other.gguf", keys=[*LLAMA, key("tokenizer.chat_template", "{{ messages }}")])
    write(tmp_path / "m-00001-of-00002.gguf", keys=[*LLAMA, key("split.no", 0), key("split.count", 2)])
    code, printed, said = run("patch", tmp_path / arguments[0], *arguments[1:], "-o", tmp_path / "new.gguf")
    assert (code, printed) == (2, "")
    assert all(line.startswith("error: ") for line in said.splitlines())
    assert words in said
    assert not (tmp_path / "new.gguf").exists()


def test_patch_does_not_overwrite(run: Run, gguf: Path) -> None:
    code, _, said = run("patch", gguf, "-o", gguf)
    assert code == 2
    assert "exists already" in said
