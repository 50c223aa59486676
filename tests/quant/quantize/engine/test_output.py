"""What is believed of an earlier run: its record, where every file stands or only lacks its final name."""

import json
from pathlib import Path

import pytest

from quant.quantize.engine import journal
from quant.quantize.engine.output import read_finished, record_path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A variant of two shards, whose run was ended after the first of them got its final name."""
    path = tmp_path / "V.gguf"
    (tmp_path / "V-00001-of-00002.gguf").write_bytes(b"one")
    (tmp_path / "V-00002-of-00002.gguf.partial").write_bytes(b"two")
    journal.journal_path(path).write_bytes(b"")
    files = [f"V-{n:05d}-of-00002.gguf" for n in (1, 2)]
    record_path(path).write_text(json.dumps({"identity": "weights", "files": files, "tensors": {}}))
    return path


def test_a_run_that_was_ended_while_its_shards_got_their_names_is_finished_by_naming_them(
    shards: Path,
) -> None:
    record = read_finished(shards, "weights")
    assert record and record["tensors"] == {}
    assert sorted(p.name for p in shards.parent.glob("*.gguf*")) == [
        "V-00001-of-00002.gguf",
        "V-00002-of-00002.gguf",
        "V.gguf.json",
    ]
    assert (shards.parent / "V-00002-of-00002.gguf").read_bytes() == b"two"


def test_what_was_made_of_other_weights_is_not_taken(shards: Path) -> None:
    assert read_finished(shards, "other weights") is None
    assert not (shards.parent / "V-00002-of-00002.gguf").exists()


def test_a_record_whose_files_are_gone_is_not_believed(shards: Path) -> None:
    (shards.parent / "V-00001-of-00002.gguf").unlink()
    assert read_finished(shards, "weights") is None


@pytest.mark.parametrize("text", ["", "{", '{"identity": "weights", "fil'])
def test_a_record_that_is_cut_short_is_none(shards: Path, text: str) -> None:
    record_path(shards).write_text(text)
    assert read_finished(shards, "weights") is None
