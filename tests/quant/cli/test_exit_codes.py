"""What scripts see: 0 done, 1 a check failed, 2 wrong input, 3 interrupted; and never a traceback."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from quant import cli
from quant.cli.options import quant
from quant.core.errors import CheckError, InputError, ToolError, Unreachable
from quant.llama.toolchain import Toolchain
from tests.gguf_files import write
from tests.processes import PATIENCE_SECONDS, lives, wait_for, written_pid


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of a command, as ``main`` would leave with it."""
    monkeypatch.setattr(sys, "argv", ["quant", *map(str, arguments)])
    try:
        return cli._run()
    except SystemExit as e:
        assert isinstance(e.code, int)
        return e.code


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """A command ``quant fail`` that raises what it is given."""

    def add(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setitem(quant.commands, "fail", click.Command("fail", callback=fail))

    return add


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            InputError("first: wrong", "second: wrong"),
            2,
            "error: first: wrong\nerror: second: wrong\n",
        ),
        (ToolError("llama-x: gone"), 2, "error: llama-x: gone\n"),
        (CheckError("f.gguf: off"), 1, "error: f.gguf: off\n"),
        (Unreachable("hub: no answer"), 1, "error: hub: no answer\n"),
        (click.UsageError("no such thing"), 2, "Usage: quant"),
        (click.exceptions.Exit(5), 5, ""),
        (SystemExit(1), 1, ""),
    ],
)
def test_every_outcome_has_its_exit_code(
    failing: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    failing(error)
    assert run(monkeypatch, "fail") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == message or (message.startswith("Usage") and "no such thing" in err)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupted_command_says_how_to_continue(
    failing: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    failing(error)
    assert run(monkeypatch, "fail") == 3
    assert capsys.readouterr().err.endswith("interrupted; run the same command again to continue\n")


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ("inspect", "--help")])
def test_asking_for_help_is_no_error(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *arguments) == 0


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("inspect",), ("inspect", "--nonsense"), ("smoke", "f", "--port", "0"), ()],
)
def test_a_wrong_call_is_wrong_input(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *arguments) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "none.gguf"),
        ("merge", "none.gguf", "out.gguf"),
        ("build", "no-such-model", "-o", "out"),
        ("build", "none.toml", "-o", "out"),
        ("build", "tiny-glm", "-v", "UD-Q9", "-o", "out"),
        ("build", "tiny-glm", "-v", "BF16", "-v", "BF16", "-o", "out"),
        ("build", "tiny-glm", "--waive", "no-such-scenario", "-o", "out"),
        ("pull", "no-such-model"),
        ("smoke", "none.gguf"),
        ("demo", "--llama-cpp", "nowhere"),
    ],
)
def test_a_missing_file_is_wrong_input_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    named = [a for a in arguments[1:] if a in message]
    assert named
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_variant_is_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "build", "tiny-glm", "-v", "UD-Q9", "-v", "UD-Q8", "-o", "out") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from quant.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_the_command_and_its_tool(
    fake_tools: Callable[..., Toolchain], tmp_path: Path, number: signal.Signals
) -> None:
    pid = tmp_path / "pid"
    tools = fake_tools(llama_server=f"echo $$ > {pid}; exec sleep 60")
    with start("doctor", "--llama-cpp", tools.bin) as command:
        tool = written_pid(pid)
        command.send_signal(number)
        _, err = command.communicate(timeout=PATIENCE_SECONDS)
    assert command.returncode == 3
    assert err.strip() == "interrupted; run the same command again to continue"
    wait_for(lambda: not lives(tool))


def test_the_installed_command_exits_with_the_code(tmp_path: Path) -> None:
    with start("inspect", tmp_path / "none.gguf") as command:
        out, err = command.communicate(timeout=PATIENCE_SECONDS)
    assert (command.returncode, out) == (2, "")
    assert err == f"error: {tmp_path / 'none.gguf'}: cannot be read (No such file or directory)\n"
    with start("inspect", write(tmp_path / "f.gguf")) as command:
        out, err = command.communicate(timeout=PATIENCE_SECONDS)
    assert (command.returncode, err) == (0, "")
    assert "2 tensors" in out


def test_a_token_in_a_problem_is_redacted(
    failing: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Somebody may put one into a recipe or on a command line, where an error would quote it."""
    monkeypatch.setenv("HF_TOKEN", "my-token-of-another-kind")
    failing(
        InputError(
            "title: found 'hf_ATokenInTheWrongPlace'", "name: found 'my-token-of-another-kind'"
        )
    )
    assert run(monkeypatch, "fail") == 2
    assert capsys.readouterr().err == "error: title: found 'hf_…'\nerror: name: found '…'\n"
