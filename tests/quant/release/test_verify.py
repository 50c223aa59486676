"""Verifying a release: differences are found and named, and so is what was not checked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.core.errors import InputError
from quant.core.files import Receipt, hash_file
from quant.llama.gguf import read_header
from quant.plan.recipe import Rule
from quant.release.folder import CHECKSUMS, PROVENANCE
from quant.release.manifest import MANIFEST, TemplateRecord
from quant.release.verify import verify_release
from tests.quant.release.folders import (
    RECIPE,
    describe_variant,
    with_license,
    write_checksums,
    write_lists,
)


def problems(release: Path) -> tuple[str, ...]:
    return verify_release(release).problems


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[read_header(path).data_start] ^= 1
    path.write_bytes(data)


def test_a_sound_release_has_no_problems_and_the_result_says_what_was_not_checked(
    release: Path,
) -> None:
    result = verify_release(release)
    assert result.problems == ()
    assert any("quant rebuild" in line for line in result.unchecked)
    assert any("signature" in line for line in result.unchecked)


def test_a_flipped_bit_is_found_and_its_file_named(release: Path) -> None:
    flip_a_bit(release / "a.gguf")
    (problem,) = problems(release)
    assert "a.gguf: expected sha256" in problem


def test_a_missing_file_and_a_file_too_many_are_both_named(release: Path) -> None:
    (release / "params").unlink()
    (release / "stranger").write_text("?")
    assert [p.split(": ")[1].split(";")[0] for p in problems(release)] == [
        "missing",
        "not of this release",
    ]


def test_files_that_the_hub_and_its_client_add_are_no_part_of_a_release(release: Path) -> None:
    (release / ".gitattributes").write_text("*.gguf filter=lfs")
    (release / ".cache" / "huggingface").mkdir(parents=True)
    (release / ".cache" / "huggingface" / "a.metadata").write_text("?")
    assert problems(release) == ()


def test_changed_tensors_are_found_although_the_checksums_fit(release: Path) -> None:
    flip_a_bit(release / "a.gguf")
    write_checksums(release)
    assert any("tensor" in p and "sha256" in p for p in problems(release))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {
                "chat_template": TemplateRecord(
                    original_sha256="0" * 64, sha256="0" * 64, patch=None
                )
            },
            "tokenizer.chat_template: expected sha256 000",
        ),
        ({"variants": ()}, "a.gguf: no variant of manifest.json has this file"),
        (
            {"recipe": with_license("apache-2.0")},
            "README.md: license: expected apache-2.0, as in manifest.json",
        ),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_found(
    release: Path, changes: dict[str, Any], problem: str
) -> None:
    write_lists(release, **changes)
    assert any(problem in p for p in problems(release)), problems(release)


def test_types_other_than_the_recipes_are_found(release: Path) -> None:
    header = read_header(release / "a.gguf")
    recipe = replace(RECIPE, rules=(Rule(tensors=".*", type="Q2_K", why="It is so."),))
    write_lists(release, variants=(replace(describe_variant(release), recipe=recipe),))
    wrong = [p for p in problems(release) if "of its recipe says Q2_K, found" in p]
    assert wrong and all(any(t.name in p for t in header.tensors) for p in wrong)


def test_a_tensor_that_the_coverage_policy_raised_is_as_its_rule_and_the_manifest_say(
    release: Path,
) -> None:
    names = [t.name for t in read_header(release / "a.gguf").tensors]
    recipe = replace(RECIPE, rules=(Rule(tensors=".*", type="Q2_K", why="It is so."),))
    variant = replace(describe_variant(release), recipe=recipe)
    write_lists(release, variants=(replace(variant, raised=dict.fromkeys(names, "Q2_K")),))
    assert not [p for p in problems(release) if "of its recipe says" in p]
    write_lists(release, variants=(replace(variant, raised=dict.fromkeys(names, "IQ1_S")),))
    assert any("says Q2_K, found IQ1_S" in p for p in problems(release))


def test_shards_other_than_the_manifests_are_found(release: Path) -> None:
    files = (Receipt("a.gguf", "0" * 64, 1), Receipt("b.gguf", "0" * 64, 1))
    write_lists(release, variants=(replace(describe_variant(release), files=files),))
    assert any("expected the shards a.gguf, b.gguf, found a.gguf" in p for p in problems(release))
    assert any("a.gguf: expected 1 bytes, found" in p for p in problems(release))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "---\nlicense: mit\n---\n[A](a.gguf) [B](b.gguf)",
            "README.md: links to b.gguf, which is missing",
        ),
        ("---\nlicense: mit\n---\nnothing", "README.md: expected a link to a.gguf, found none"),
        ("---\nlicense: other\n---\n[A](a.gguf)", "README.md: license: expected mit"),
    ],
)
def test_a_card_that_does_not_fit_its_files_is_found(
    release: Path, text: str, problem: str
) -> None:
    (release / "README.md").write_text(text)
    write_lists(release)
    assert len(problems(release)) == 1
    assert problem in problems(release)[0]


def test_provenance_of_other_files_is_found(release: Path) -> None:
    path = release / PROVENANCE
    digest = hash_file(release / "params")
    path.write_text(path.read_text().replace(digest, "0" * 64))
    write_checksums(release)
    (problem,) = problems(release)
    assert f"{PROVENANCE}: params: expected sha256 {digest}, found {'0' * 64}" in problem


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "\xff"])
def test_a_folder_that_is_no_release_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=MANIFEST):
        verify_release(tmp_path)


def test_a_list_with_a_name_outside_the_release_is_refused(release: Path) -> None:
    (release / CHECKSUMS).write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(InputError, match="inside the release"):
        verify_release(release)
