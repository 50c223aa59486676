from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quant.core.files import hash_file
from quant.errors import InputError
from quant.llama.gguf import read_header
from quant.release.package import CHECKSUMS, MANIFEST, PROVENANCE
from quant.release.verify import verify_release
from tests.quant.release.folders import RECIPE, lists, manifest_of, sums


def problems(release: Path) -> tuple[str, ...]:
    return verify_release(release).problems


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[read_header(path).data_start] ^= 1
    path.write_bytes(data)


def test_a_sound_release_has_no_problems_and_what_was_not_looked_at_is_said(release: Path) -> None:
    found = verify_release(release)
    assert found.problems == ()
    assert any("quant rebuild" in line for line in found.unchecked)
    assert any("signature" in line for line in found.unchecked)


def test_a_flipped_bit_is_found_and_the_file_named(release: Path) -> None:
    flip(release / "a.gguf")
    (problem,) = problems(release)
    assert "a.gguf: expected sha256" in problem


def test_a_file_that_is_missing_and_one_too_many_are_both_told(release: Path) -> None:
    (release / "params").unlink()
    (release / "stranger").write_text("?")
    assert [p.split(": ")[1].split(";")[0] for p in problems(release)] == [
        "missing",
        "not of this release",
    ]


def test_what_the_hub_and_its_client_leave_is_no_part_of_a_release(release: Path) -> None:
    (release / ".gitattributes").write_text("*.gguf filter=lfs")
    (release / ".cache" / "huggingface").mkdir(parents=True)
    (release / ".cache" / "huggingface" / "a.metadata").write_text("?")
    assert problems(release) == ()


def test_other_tensors_under_fitting_checksums_are_found(release: Path) -> None:
    flip(release / "a.gguf")
    sums(release)
    assert any("tensor" in p and "sha256" in p for p in problems(release))


def changed_variant(release: Path, **changes: Any) -> Iterator[dict[str, Any]]:
    for variant in manifest_of(release)["variants"]:
        yield variant | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"chat_template": {"sha256": "0" * 64, "patch": None}},
            "tokenizer.chat_template: expected sha256 000",
        ),
        ({"variants": []}, "a.gguf: no variant of manifest.json has this file"),
        (
            {
                "recipe": {
                    "card": {"license": "apache-2.0"},
                    "imatrix": {},
                    "max_shard_size": "",
                    "pre_tokenizer": "",
                }
            },
            "README.md: license: expected apache-2.0, as in manifest.json",
        ),
    ],
)
def test_a_manifest_that_says_something_else_than_the_files_is_found(
    release: Path, changes: dict[str, Any], said: str
) -> None:
    lists(release, **changes)
    assert any(said in p for p in problems(release)), problems(release)


def test_types_that_the_recipe_does_not_give_are_found(release: Path) -> None:
    header = read_header(release / "a.gguf")
    rule = {"tensors": ".*", "type": "Q2_K", "why": "It is so."}
    lists(release, variants=list(changed_variant(release, recipe=RECIPE | {"rules": [rule]})))
    found = [p for p in problems(release) if "of its recipe says Q2_K, found" in p]
    assert found and all(any(t.name in p for t in header.tensors) for p in found)


def test_shards_that_are_not_those_of_the_manifest_are_found(release: Path) -> None:
    listed = [{"path": "a.gguf", "bytes": 1}, {"path": "b.gguf", "bytes": 1}]
    lists(release, variants=list(changed_variant(release, files=listed)))
    assert any("expected the shards a.gguf, b.gguf, found a.gguf" in p for p in problems(release))
    assert any("a.gguf: expected 1 bytes, found" in p for p in problems(release))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "---\nlicense: mit\n---\n[A](a.gguf) [B](b.gguf)",
            "README.md: leads to b.gguf, which is not here",
        ),
        ("---\nlicense: mit\n---\nnothing", "README.md: says nothing of a.gguf"),
        ("---\nlicense: other\n---\n[A](a.gguf)", "README.md: license: expected mit"),
    ],
)
def test_a_card_that_does_not_fit_its_files_is_found(release: Path, text: str, said: str) -> None:
    (release / "README.md").write_text(text)
    lists(release)
    assert len(problems(release)) == 1
    assert said in problems(release)[0]


def test_provenance_of_other_files_is_found(release: Path) -> None:
    path = release / PROVENANCE
    path.write_text(path.read_text().replace(hash_file(release / "params"), "0" * 64))
    sums(release)
    (problem,) = problems(release)
    assert (
        f"{PROVENANCE}: params: expected sha256 {hash_file(release / 'params')}, found {'0' * 64}"
        in problem
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}'])
def test_a_folder_that_is_no_release_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=MANIFEST):
        verify_release(tmp_path)


def test_a_list_that_points_outside_is_refused(release: Path) -> None:
    (release / CHECKSUMS).write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(InputError, match="inside the release"):
        verify_release(release)
