"""Child programs: a job in, a result or an error out, and a crash that quotes the log."""

import os
from pathlib import Path
from typing import Any

import pytest

from quant.core import child, errors, progress
from quant.core.child import JOB, LOG, OUTCOME, PROGRESS, CrashError, run_child
from quant.core.errors import CheckError, InputError, QuantError, ToolError, Unreachable

PROGRAM = """
import ctypes, os, signal, sys, time
from quant.core import child, progress
from quant.core.errors import CheckError, InputError, ToolError, Unreachable

class Special(CheckError):
    pass

def entry(job, folder):
    {body}

if __name__ == "__main__":
    child.run_job(entry)
"""


class Program:
    """A child program whose entry has the given body."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.path = folder / "program.py"
        self.env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"}

    def run(self, body: str, **job: Any) -> Any:
        self.path.write_text(PROGRAM.format(body=body))
        return run_child("program", job, folder=self.folder, name="the program", env=self.env)

    def error(self, body: str) -> QuantError:
        with pytest.raises(QuantError) as caught:
            self.run(body)
        return caught.value


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def test_the_job_goes_in_and_the_result_comes_out(program: Program) -> None:
    body = "return [job['path'], job['number'] + 1, folder.name, os.getcwd()]"
    result = program.run(body, path=Path("/a/b"), number=1)
    assert result == ["/a/b", 2, "work", str(program.folder)]
    assert [p.name for p in program.folder.iterdir()] == [LOG]


def test_a_program_without_a_result_returns_none(program: Program) -> None:
    assert program.run("pass") is None


@pytest.mark.parametrize("kind", [InputError, CheckError, Unreachable])
def test_an_error_keeps_its_class_and_all_its_problems(
    program: Program, kind: type[QuantError]
) -> None:
    error = program.error(f"print('noise'); raise {kind.__name__}('first', 'second')")
    assert type(error) is kind
    assert error.problems == ("first", "second")


def test_every_error_of_the_tree_can_cross() -> None:
    kinds = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, QuantError)]
    assert {child._find_class(kind("x")) for kind in kinds} == {kind.__name__ for kind in kinds}


def test_an_error_of_another_class_crosses_as_its_nearest_base(program: Program) -> None:
    assert type(program.error("raise Special('x')")) is CheckError


def test_a_tool_error_quotes_what_the_library_printed(program: Program) -> None:
    error = program.error("os.write(2, b'unknown architecture\\n'); raise ToolError('a', 'b')")
    assert type(error) is ToolError
    first, second = error.problems
    assert first == "a"
    assert second.startswith("b; end of the log:\n    $ ")
    assert second.endswith("\n    unknown architecture")


def test_a_tool_error_of_a_silent_program_is_one_line(program: Program) -> None:
    assert program.error("raise ToolError('a')").problems == ("a",)


def test_a_failed_job_stays_for_inspection(program: Program) -> None:
    program.error("raise InputError('x')")
    assert {p.name for p in program.folder.iterdir()} == {JOB, OUTCOME, LOG}
    assert program.run("return 1") == 1
    assert {p.name for p in program.folder.iterdir()} == {LOG}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('odd')", "the program exited with 1; end of the log:\n"),
        ("sys.exit(7)", "the program exited with 7; end of the log:\n"),
        ("os._exit(0)", "the program ended without an outcome"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL (out of memory?)"),
        ("os.abort()", "the program was ended by SIGABRT"),
        ("return object()", "is not JSON serializable"),
    ],
)
def test_a_program_without_an_outcome_has_crashed(program: Program, body: str, reason: str) -> None:
    error = program.error(body)
    assert type(error) is CrashError
    assert error.exit_code == 2
    assert reason in str(error)


def test_a_crash_quotes_the_end_of_the_log(program: Program) -> None:
    error = program.error("raise ValueError('odd')")
    assert str(error).endswith("\n    ValueError: odd")


def test_the_outcome_of_an_earlier_run_is_ignored(program: Program) -> None:
    (program.folder / OUTCOME).write_text('{"result": "old"}')
    assert "without an outcome" in str(program.error("os._exit(0)"))


def test_a_full_disk_is_wrong_input(program: Program) -> None:
    body = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        " (folder / 'big').write_bytes(b'x' * 1000)"
    )
    # The child meets the limit; the parent sees the file of 100 bytes only with the same limit.
    assert type(program.error(body)) is CrashError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quant.core.process.find_write_problem", lambda _: "no space left")
        error = program.error(body)
    assert type(error) is InputError
    assert str(error) == (
        f"{program.folder}: the program stopped: no space left; free some and run again"
    )


def test_progress_crosses(program: Program) -> None:
    fractions: list[float] = []
    with progress.listen_to_progress(fractions.append):
        program.run("progress.report_progress(0.25); time.sleep(1.5)")
    assert fractions
    assert set(fractions) == {0.25}
    assert not (program.folder / PROGRESS).exists()


def test_half_of_a_number_is_no_progress(tmp_path: Path) -> None:
    fractions: list[float] = []
    with progress.listen_to_progress(fractions.append):
        for text in ("", "0.", "0.5"):
            (tmp_path / PROGRESS).write_text(text)
            child._pass_progress_on(tmp_path / PROGRESS)
        child._pass_progress_on(tmp_path / "none")
    assert fractions == [0.0, 0.5]


def test_a_program_in_the_middle_of_something_ends_at_once(program: Program) -> None:
    """A thread that hangs keeps an interpreter alive that ends in the usual way."""
    body = "import threading; threading.Thread(target=time.sleep, args=(60,)).start(); return 1"
    assert program.run(body) == 1
