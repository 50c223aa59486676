"""Errors: what each kind means to a script, and that full disks and near misses are told plainly."""

import errno
from pathlib import Path

import pytest

from quant.core.errors import (
    CheckError,
    InputError,
    QuantError,
    ToolError,
    Unreachable,
    convert_disk_errors,
    raise_problems,
    suggest_name,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [(QuantError, 1), (CheckError, 1), (Unreachable, 1), (InputError, 2), (ToolError, 2)],
)
def test_every_kind_of_error_has_its_exit_code(kind: type[QuantError], code: int) -> None:
    assert kind("x").exit_code == code


def test_an_error_keeps_its_problems_apart_and_prints_one_a_line() -> None:
    error = InputError("first", "second")
    assert error.problems == ("first", "second")
    assert str(error) == "first\nsecond"


def test_no_problem_is_no_error() -> None:
    raise_problems([])
    raise_problems(iter(()))


def test_all_problems_are_raised_at_once() -> None:
    with pytest.raises(InputError) as caught:
        raise_problems(f"problem {n}" for n in range(3))
    assert caught.value.problems == ("problem 0", "problem 1", "problem 2")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("q4_k", "did you mean 'Q4_K'?"),
        ("Q4K", "did you mean 'Q4_K'?"),
        ("IQ4_N", "did you mean 'IQ4_NL'?"),
        ("zzz", "known are IQ4_NL, Q4_K, bf16"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_or_all_names(name: str, answer: str) -> None:
    assert suggest_name(name, ["Q4_K", "IQ4_NL", "bf16"]) == answer


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file(number: int, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"^/deep/file: .*; free some and run again$"),
        convert_disk_errors(tmp_path),
    ):
        raise OSError(number, "full", "/deep/file")


def test_a_full_disk_names_the_folder_if_the_error_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, convert_disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "full")
    assert str(caught.value).startswith(f"{tmp_path}: no space left")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(number: int, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"/locked: cannot be written \(no\)"),
        convert_disk_errors(tmp_path),
    ):
        raise OSError(number, "no", "/locked")


def test_other_errors_of_the_system_are_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), convert_disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone", "x")
