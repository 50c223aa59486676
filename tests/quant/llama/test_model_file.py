"""A GGUF model on disk: what it reads, how often, and what names it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.core import files
from quant.core.errors import InputError
from quant.core.files import Receipt, make_receipt
from quant.core.format import hash_texts
from quant.llama import gguf, model_file
from quant.llama.gguf import Header
from quant.llama.model_file import ModelFile
from tests.gguf_files import LLAMA, TWO, key, write


@pytest.fixture
def header_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of every header that is read during the test."""
    reads: list[Path] = []
    read_header = gguf.read_header

    def count(path: Path) -> Header:
        reads.append(path)
        return read_header(path)

    monkeypatch.setattr(gguf, "read_header", count)
    return reads


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of every file that is hashed during the test."""
    paths: list[Path] = []

    def count(path: Path, root: Path) -> Receipt:
        paths.append(path)
        return make_receipt(path, root)

    monkeypatch.setattr(files, "make_receipt", count)
    return paths


@pytest.fixture
def split_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a model of two shards, without some of them."""

    def write_shards(missing: tuple[int, ...] = ()) -> Path:
        for n in (0, 1):
            if n not in missing:
                keys = [*LLAMA, key("split.no", n), key("split.count", 2)]
                write(tmp_path / f"m-{n + 1:05d}-of-00002.gguf", [TWO[n]], keys)
        return tmp_path / "m-00001-of-00002.gguf"

    return write_shards


def test_nothing_is_read_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "not-there-00001-of-00002.gguf"
    file = ModelFile.open(path)
    assert file.path == path
    assert [p.name for p in file.paths] == [path.name, "not-there-00002-of-00002.gguf"]


def test_the_headers_are_read_once_whoever_asks(
    split_model: Callable[..., Path], header_reads: list[Path]
) -> None:
    file = ModelFile.open(split_model())
    for _ in range(3):
        assert file.header.architecture == "llama"
        assert file.metadata["split.no"] == 0
        assert [t.name for t in file.tensors] == ["a.weight", "b.weight"]
        assert len(file.headers) == 2
        assert file.receipts
    assert header_reads == list(file.paths)


def test_the_digest_of_one_file_is_its_sha256(tmp_path: Path, hashed: list[Path]) -> None:
    path = write(tmp_path / "m.gguf")
    file = ModelFile.open(path)
    assert file.digest == file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.receipts == (Receipt("m.gguf", file.digest, path.stat().st_size),)
    assert hashed == [path]


def test_the_digest_of_shards_is_that_of_the_list_of_their_sha256(
    split_model: Callable[..., Path],
) -> None:
    file = ModelFile.open(split_model())
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in file.paths]
    assert [r.sha256 for r in file.receipts] == digests
    assert file.digest == hash_texts(digests)
    assert file.digest != hash_texts(digests[::-1])


def test_known_receipts_are_used_without_reading_a_byte(tmp_path: Path, hashed: list[Path]) -> None:
    file = ModelFile((tmp_path / "not-there.gguf",), (Receipt("not-there.gguf", "ab" * 32, 7),))
    assert (file.digest, file.bytes) == ("ab" * 32, 7)
    assert not hashed


def test_the_length_is_known_without_hashing(
    split_model: Callable[..., Path], hashed: list[Path], header_reads: list[Path]
) -> None:
    file = ModelFile.open(split_model())
    assert file.bytes == sum(p.stat().st_size for p in file.paths)
    assert not hashed and not header_reads


@pytest.mark.parametrize("attribute", ["headers", "metadata", "tensors", "receipts", "digest"])
def test_a_missing_shard_is_named(
    split_model: Callable[..., Path], hashed: list[Path], attribute: str
) -> None:
    file = ModelFile.open(split_model(missing=(1,)))
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf: missing; expected 2 shards"):
        getattr(file, attribute)
    assert not hashed


def test_two_models_are_equal_if_their_paths_are(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    one, two = ModelFile.open(path), ModelFile.open(path)
    _ = one.headers
    assert one == two and hash(one) == hash(two)
    assert model_file.ModelFile is ModelFile
