"""Free disk space: one line with both numbers before a large write, and the reason after a failed one."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from quant.core import disk
from quant.core.disk import (
    find_existing_folder,
    find_space_problem,
    find_write_problem,
    measure_folder,
    measure_free_space,
    reserve_file,
)
from quant.core.errors import InputError
from quant.core.memory import measure_free_memory


def test_a_byte_too_little_is_one_line_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "measure_free_space", lambda _: 1234)
    assert find_space_problem(tmp_path, 1234) is None
    assert find_space_problem(tmp_path, 1235) == (
        f"{tmp_path}: expected 1,235 bytes free, found 1,234; free some and run again"
    )
    line = find_space_problem(tmp_path, 1235, purpose=" for shards", advice="name another folder")
    assert line == (
        f"{tmp_path}: expected 1,235 bytes free for shards, found 1,234; name another folder"
    )


def test_a_path_that_does_not_exist_is_on_the_disk_of_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert find_existing_folder(tmp_path / "a" / "b") == tmp_path
    assert find_existing_folder(tmp_path / "file") == tmp_path
    assert find_existing_folder(tmp_path) == tmp_path
    assert measure_free_space(tmp_path / "a" / "b") > 0


def test_a_relative_path_is_on_the_disk_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_existing_folder(Path("a/b")) == tmp_path


def test_a_file_with_two_names_takes_its_bytes_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "first").write_bytes(b"x" * 10**6)
    once = measure_folder(tmp_path)
    (tmp_path / "second").hardlink_to(tmp_path / "sub" / "first")
    assert once >= 10**6
    assert measure_folder(tmp_path) == once


def test_a_sparse_file_gets_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as f:
        f.truncate(10**6)
    assert path.stat().st_blocks * 512 < 10**6
    reserve_file(path)
    assert path.stat().st_blocks * 512 >= 10**6
    assert path.stat().st_size == 10**6


def test_a_file_that_cannot_be_reserved_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "sparse"
    path.write_bytes(b"x" * 2000)
    monkeypatch.setattr(disk.os, "posix_fallocate", refuse)  # type: ignore[attr-defined]  # its os
    with pytest.raises(InputError) as refused:
        reserve_file(path, advice="take fewer chunks")
    expected = f"{tmp_path}: expected 2,000 bytes free for sparse, found "
    assert str(refused.value).startswith(expected)
    assert str(refused.value).endswith("(No space left on device); take fewer chunks")


def test_a_full_disk_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_write_problem(tmp_path) is None
    monkeypatch.setattr(disk, "measure_free_space", lambda _: disk.FULL_BYTES - 1)
    assert find_write_problem(tmp_path) == "no space left"


def test_a_file_at_the_limit_of_the_shell_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 1000)
    code = (
        "import resource, sys; from pathlib import Path;"
        "from quant.core.disk import find_write_problem;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2);"
        "print(find_write_problem(Path(sys.argv[1])))"
    )
    for limit, reason in (
        (1000, "a file grew too large (the limit here is 1000 bytes)"),
        (1001, "None"),
    ):
        command = [sys.executable, "-c", code, str(tmp_path), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"{reason}\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_free_memory_is_less_than_all_of_it() -> None:
    total = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())[
        "MemTotal"
    ]
    assert 0 < measure_free_memory() < int(total.split()[0]) * 1024
