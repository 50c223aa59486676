"""The record of an earlier run: it counts if every file exists, or only lacks its final name."""

import json
from pathlib import Path

import pytest

from quant.quantize.engine import journal
from quant.quantize.engine.output import record_path, recover_record


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return the path of a variant of two shards, of which the second lacks its final name."""
    path = tmp_path / "V.gguf"
    (tmp_path / "V-00001-of-00002.gguf").write_bytes(b"one")
    (tmp_path / "V-00002-of-00002.gguf.partial").write_bytes(b"two")
    journal.journal_path(path).write_bytes(b"")
    files = [f"V-{n:05d}-of-00002.gguf" for n in (1, 2)]
    record_path(path).write_text(json.dumps({"identity": "weights", "files": files, "tensors": {}}))
    return path


def test_shards_that_lack_their_final_names_get_them(
    shards: Path,
) -> None:
    record = recover_record(shards, "weights")
    assert record and record["tensors"] == {}
    assert sorted(p.name for p in shards.parent.glob("*.gguf*")) == [
        "V-00001-of-00002.gguf",
        "V-00002-of-00002.gguf",
        "V.gguf.json",
    ]
    assert (shards.parent / "V-00002-of-00002.gguf").read_bytes() == b"two"


def test_a_variant_of_another_base_does_not_count(shards: Path) -> None:
    assert recover_record(shards, "other weights") is None
    assert not (shards.parent / "V-00002-of-00002.gguf").exists()


def test_a_record_whose_files_are_gone_does_not_count(shards: Path) -> None:
    (shards.parent / "V-00001-of-00002.gguf").unlink()
    assert recover_record(shards, "weights") is None


@pytest.mark.parametrize("text", ["", "{", '{"identity": "weights", "fil'])
def test_a_record_that_is_cut_short_does_not_count(shards: Path, text: str) -> None:
    record_path(shards).write_text(text)
    assert recover_record(shards, "weights") is None
