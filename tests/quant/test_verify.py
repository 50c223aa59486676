import json
from pathlib import Path

import pytest

from quant.errors import InputError
from quant.files import digest
from quant.header import read_header
from quant.package import CHECKSUMS, FORMAT, MANIFEST
from quant.verify import verify
from tests.gguf_files import write as write_gguf


def lists(release: Path) -> None:
    """Write the lists of a release as they have to be."""
    header = read_header(release / "a.gguf")
    tensors = {t.name: {"type": t.type.name, "sha256": header.tensor_digests()[t.name]} for t in header.tensors}
    variant = {"name": "A", "files": [{"path": "a.gguf"}], "tensors": tensors}
    (release / MANIFEST).write_text(json.dumps({"format": FORMAT, "variants": [variant]}))
    sums(release)


def sums(release: Path) -> None:
    names = [p.name for p in sorted(release.iterdir()) if p.name not in (CHECKSUMS, MANIFEST)]
    (release / CHECKSUMS).write_text("".join(f"{digest(release / n)}  {n}\n" for n in names))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "a.gguf")
    (tmp_path / "params").write_text("{}")
    lists(tmp_path)
    return tmp_path


def test_a_sound_release_has_no_problems(release: Path) -> None:
    assert verify(release) == ()


def test_a_flipped_bit_is_found_and_the_file_named(release: Path) -> None:
    data = bytearray((release / "a.gguf").read_bytes())
    data[read_header(release / "a.gguf").data_start] ^= 1
    (release / "a.gguf").write_bytes(data)
    (problem,) = verify(release)
    assert "a.gguf: expected sha256" in problem


def test_a_file_that_is_missing_and_one_too_many_are_both_told(release: Path) -> None:
    (release / "params").unlink()
    (release / "stranger").write_text("?")
    assert [p.split(": ")[1].split(";")[0] for p in verify(release)] == ["missing", "not of this release"]


def test_other_tensors_under_fitting_checksums_are_found(release: Path) -> None:
    data = bytearray((release / "a.gguf").read_bytes())
    data[read_header(release / "a.gguf").data_start] ^= 1
    (release / "a.gguf").write_bytes(data)
    sums(release)
    assert any("tensor" in p and "sha256" in p for p in verify(release))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}'])
def test_a_folder_that_is_no_release_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=MANIFEST):
        verify(tmp_path)


def test_a_list_that_points_outside_is_refused(release: Path) -> None:
    (release / CHECKSUMS).write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(InputError, match="inside the release"):
        verify(release)
