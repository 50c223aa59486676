"""Files: whole or absent, and receipts that say what was written."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.core import files
from quant.core.files import Receipt
from quant.core.format import to_canonical_json, to_pretty_json


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_only_if_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    with files.open_atomic(path) as f:
        f.write(b"half")
        assert not path.exists()
        f.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), files.open_atomic(path) as f:
        f.write(b"new")
        raise failure
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = Path.replace

    def flushed(fd: int) -> None:
        events.append(f"flush {Path(f'/proc/self/fd/{fd}').readlink()}")

    def renamed(self: Path, to: Path) -> Path:
        events.append(f"rename to {to}")
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    path = tmp_path / "file"
    files.write_text(path, "x")
    assert events == [f"flush {path}.partial", f"rename to {path}", f"flush {tmp_path}"]


def test_a_folder_gets_its_name_after_all_that_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "x.partial"
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / "f").write_text("1")
    (partial / "link").symlink_to("sub/f")
    flushed: list[Path] = []
    monkeypatch.setattr(files, "flush_file", flushed.append)
    monkeypatch.setattr(files, "flush_folder", flushed.append)
    files.commit_folder(partial, tmp_path / "x")
    assert flushed == [partial / "sub", partial / "sub" / "f", partial, tmp_path]
    assert (tmp_path / "x" / "link").read_text() == "1"
    assert not partial.exists()


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    files.write_text(tmp_path / "f", "Grüße 世界\r\n")
    assert (tmp_path / "f").read_bytes() == "Grüße 世界\r\n".encode()


def test_a_receipt_has_name_digest_and_length(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    files.write_text(path, "hello")
    assert files.make_receipt(path, tmp_path) == Receipt(
        "a/b", hashlib.sha256(b"hello").hexdigest(), 5
    )
    assert files.hash_file(path) == hashlib.sha256(b"hello").hexdigest()


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_canonical_json_holds_the_whole_value(value: Any) -> None:
    assert json.loads(to_canonical_json(value)) == value


def test_equal_values_have_one_canonical_text() -> None:
    assert (
        to_canonical_json({"b": (1, 2), "a": "ü"})
        == to_canonical_json({"a": "ü", "b": [1, 2]})
        == '{"a":"ü","b":[1,2]}'
    )


def test_text_for_people_keeps_the_order_of_keys() -> None:
    assert to_pretty_json({"b": 1, "a": ["ü"]}) == '{\n  "b": 1,\n  "a": [\n    "ü"\n  ]\n}\n'


def test_a_linked_file_is_a_second_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    files.link_or_copy(tmp_path / "a", tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").samefile(tmp_path / "a")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_a_file_is_copied_where_it_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("x")
    files.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


def test_linking_never_overwrites_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    with pytest.raises(FileExistsError):
        files.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "y"


def test_files_folders_and_links_are_removed_and_a_missing_one_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").touch()
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("link", "folder", "file", "nothing"):
        files.remove(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "f").exists()


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_temp_folder_is_empty_at_first_and_removed_afterwards(
    tmp_path: Path, ends_well: bool
) -> None:
    final = tmp_path / "out.gguf"
    (tmp_path / "out.gguf.partial").mkdir()
    (tmp_path / "out.gguf.partial" / "left").touch()
    try:
        with files.temp_folder(final) as folder:
            assert list(folder.iterdir()) == []
            (folder / "partial").write_text("x")
            if not ends_well:
                raise ValueError
            files.replace_atomically(folder / "partial", final)
    except ValueError:
        pass
    assert [p.name for p in tmp_path.iterdir()] == (["out.gguf"] if ends_well else [])
