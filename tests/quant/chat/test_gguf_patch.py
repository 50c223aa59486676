"""Another template in an existing file: one record changes, and not a byte beside it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from quant.chat import gguf_patch
from quant.chat.gguf_patch import describe_patch, patch_file, replace_template
from quant.chat.stub_model import write_stub_model
from quant.chat.template import patch_template
from quant.core.errors import CheckError, InputError
from quant.llama.gguf import Header, pad, read_header
from quant.llama.toolchain import find_toolchain
from quant.plan.load import load_template_patch
from tests.gguf_files import LLAMA, TWO, Key, Tensor, key, text, write
from tests.quant.chat.templates import GLM
from tests.quant.chat.test_template import GGMLS, ORIGINAL, PATCHED

KEY = "tokenizer.chat_template"


def keys(template: str | None = ORIGINAL, *more: Key) -> list[Key]:
    """Metadata with a template in the middle of it."""
    return [
        *LLAMA,
        *([key(KEY, template)] if template is not None else []),
        key("last.key", [1, 2, 3]),
        *more,
    ]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", keys=keys())


def split(folder: Path, first: Sequence[Tensor], count: int = 3) -> Path:
    """The first of some shards; the last is missing when the count says more than two."""
    for no, tensors in enumerate((first, TWO)):
        own = keys() if no == 0 else []
        numbers = [key("split.no", no), key("split.count", count), key("split.tensors.count", 2)]
        write(folder / f"m-{no + 1:05d}-of-{count:05d}.gguf", tensors, [*own, *numbers])
    return folder / f"m-00001-of-{count:05d}.gguf"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def message_of(caught: pytest.ExceptionInfo[Any]) -> str:
    [problem] = caught.value.problems
    assert "\n" not in problem
    return str(problem)


def test_only_the_record_of_the_template_changes(whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    done = patch_file(whole, tmp_path / "out.gguf", "glm-4.6")
    after = done.path.read_bytes()
    old, new = text(ORIGINAL), text(PATCHED)
    at = before.index(old)
    header, patched = read_header(whole), read_header(done.path)
    end = header.head_bytes
    assert after[: at + len(new)] == before[:at] + new
    assert after[at + len(new) : patched.head_bytes] == before[at + len(old) : end]
    assert after[patched.head_bytes : patched.data_start] == bytes(
        patched.data_start - patched.head_bytes
    )
    assert patched.data_start == pad(patched.head_bytes)
    assert after[patched.data_start :] == before[header.data_start :]
    assert list(patched.metadata) == list(header.metadata)
    assert patched.metadata == header.metadata | {KEY: PATCHED}


def test_the_source_is_not_touched_and_nothing_is_left_beside_the_result(
    whole: Path, tmp_path: Path
) -> None:
    before = whole.read_bytes()
    patch_file(whole, tmp_path / "out.gguf")
    assert whole.read_bytes() == before
    assert names(tmp_path) == ["model.gguf", "out.gguf"]


def test_the_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.gguf", [TWO[0]], keys(ORIGINAL, key("general.alignment", 256)), alignment=256
    )
    patched = read_header(patch_file(source, tmp_path / "b.gguf").path)
    assert patched.data_start % 256 == 0
    assert patched.hash_tensors() == read_header(source).hash_tensors()


def test_patched_twice_is_patched_once(whole: Path, tmp_path: Path) -> None:
    once = patch_file(whole, tmp_path / "once.gguf")
    twice = patch_file(once.path, tmp_path / "twice.gguf")
    assert twice.path.read_bytes() == once.path.read_bytes()
    assert "patched before: this is a copy" in describe_patch(twice)[1]
    assert len(describe_patch(once)) == 1


def test_digests_before_and_after_are_reported(whole: Path, tmp_path: Path) -> None:
    done = patch_file(whole, tmp_path / "out.gguf")
    assert done.template.original_sha256 == hashlib.sha256(ORIGINAL.encode()).hexdigest()
    assert done.template.sha256 == hashlib.sha256(PATCHED.encode()).hexdigest()
    assert done.template.sha256[:12] in describe_patch(done)[0]


@pytest.mark.parametrize(
    "template", [ORIGINAL, GGMLS, PATCHED], ids=["original", "ggml's", "patched"]
)
def test_the_fitting_patch_is_chosen(template: str, tmp_path: Path) -> None:
    done = patch_file(write(tmp_path / "a.gguf", keys=keys(template)), tmp_path / "b.gguf")
    assert done.patch == "glm-4.6"
    assert done.template.text == PATCHED


def test_without_a_fitting_patch_the_error_lists_the_known_ones(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", keys=keys("{{ messages }}"))
    with pytest.raises(InputError) as caught:
        patch_file(source, tmp_path / "b.gguf")
    assert "expected one patch that fits its chat template, found none" in message_of(caught)
    assert "glm-4.6" in message_of(caught)


def test_a_file_without_a_template_is_refused(tmp_path: Path) -> None:
    for number, template in enumerate((None, "")):
        source = write(tmp_path / f"{number}.gguf", keys=keys(template))
        with pytest.raises(InputError) as caught:
            patch_file(source, tmp_path / "out.gguf")
        assert message_of(caught) == f"{source}: {KEY}: missing; this file has no chat template"


@pytest.mark.parametrize(("times", "how"), [(0, ""), (2, "{0}{0}")])
def test_an_anchor_that_does_not_occur_once_stops_the_work(
    times: int, how: str, tmp_path: Path
) -> None:
    anchor = load_template_patch("glm-4.6").replacements[2].find
    source = write(tmp_path / "a.gguf", keys=keys(ORIGINAL.replace(anchor, how.format(anchor))))
    with pytest.raises(InputError) as caught:
        patch_file(source, tmp_path / "b.gguf", "glm-4.6")
    assert f"replacement 3 of glm-4.6: expected its anchor once, found it {times} times" in str(
        caught.value
    )
    assert names(tmp_path) == ["a.gguf"]


def test_nothing_is_overwritten(whole: Path, tmp_path: Path) -> None:
    for existing in (whole, tmp_path / "link.gguf"):
        if existing is not whole:
            existing.symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError) as caught:
            patch_file(whole, existing)
        assert message_of(caught) == f"{existing}: exists already; name another file or remove it"
    assert read_header(whole).metadata[KEY] == ORIGINAL


def test_a_first_shard_without_tensors_is_all_that_is_written(tmp_path: Path) -> None:
    first = split(tmp_path, (), count=2)
    done = patch_file(first, tmp_path / "new" / first.name)
    assert names(tmp_path / "new") == [first.name]
    assert read_header(done.path).metadata[KEY] == PATCHED
    assert read_header(done.path).metadata["split.count"] == 2
    assert [line.split(";")[0] for line in describe_patch(done)[1:]] == [
        "the other 1 of 2 shards stay as they are"
    ]


def test_a_first_shard_with_tensors_is_written_whole_and_the_reason_is_given(
    tmp_path: Path,
) -> None:
    first = split(tmp_path, [Tensor("c.weight")], count=2)
    done = patch_file(first, tmp_path / "new" / first.name)
    assert read_header(done.path).hash_tensors() == read_header(first).hash_tensors()
    assert "written whole: its tensors follow the template" in describe_patch(done)[1]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    first = split(tmp_path, (), count=3)
    with pytest.raises(InputError) as caught:
        patch_file(first, tmp_path / "new" / first.name)
    assert "m-00003-of-00003.gguf: missing; expected 3 shards" in message_of(caught)


def test_a_later_shard_is_refused(tmp_path: Path) -> None:
    split(tmp_path, (), count=2)
    with pytest.raises(InputError) as caught:
        patch_file(tmp_path / "m-00002-of-00002.gguf", tmp_path / "out.gguf")
    assert "expected the first shard, which has the template, found number 2" in message_of(caught)


@pytest.mark.parametrize(
    "name", ["out.gguf", "m-00001-of-00003.gguf", "m-00002-of-00002.gguf", "m-00001-of-00002.bin"]
)
def test_a_name_by_which_the_other_shards_are_not_found_is_refused(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        patch_file(split(tmp_path, (), count=2), tmp_path / "new" / name)
    assert "expected a name that ends with -00001-of-00002.gguf" in message_of(caught)


def test_a_text_that_looks_like_the_record_is_refused(tmp_path: Path) -> None:
    record = text(KEY) + (8).to_bytes(4, "little") + text("{{ x }}")
    source = write(tmp_path / "a.gguf", keys=[key("trap", record.decode()), *keys("{{ x }}")])
    with pytest.raises(InputError) as caught:
        gguf_patch.write_with_template(read_header(source), "{{ y }}", tmp_path / "b.gguf")
    assert "expected its record once in the header, found it 2 times" in message_of(caught)
    with pytest.raises(InputError, match="found it 0 times"):
        replace_template(b"GGUF", "a", "b", "x")


def test_nan_compares_equal_to_nan(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", keys=keys(ORIGINAL, key("nan", float("nan"))))
    patch_file(source, tmp_path / "b.gguf")


def _damaged_data(content: bytearray, header: Header) -> None:
    content[header.data_start + 5] ^= 1


def _damaged_key(content: bytearray, header: Header) -> None:
    content[content.index(b"tiny")] ^= 1


def _damaged_name(content: bytearray, header: Header) -> None:
    content[content.index(b"b.weight")] ^= 1


def _other_key(content: bytearray, header: Header) -> None:
    content[content.index(b"last.key")] ^= 1


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_damaged_data, "tensor a.weight: expected sha256"),
        (_damaged_key, "general.name: expected the value of"),
        (_damaged_name, "tensors: expected those of"),
        (_other_key, "keys: expected those of"),
    ],
)
def test_a_file_that_differs_in_more_than_the_template_is_not_kept(
    damage: Callable[[bytearray, Header], None],
    what: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = gguf_patch.write_with_template

    def broken(header: Header, template: str, out: Path) -> None:
        sound(header, template, out)
        content = bytearray(out.read_bytes())
        damage(content, read_header(out))
        out.write_bytes(content)

    monkeypatch.setattr(gguf_patch, "write_with_template", broken)
    with pytest.raises(CheckError) as caught:
        patch_file(whole, tmp_path / "out.gguf")
    assert what in caught.value.problems[0]
    assert not (tmp_path / "out.gguf").exists()


def test_the_template_that_is_written_is_the_patched_one(whole: Path, tmp_path: Path) -> None:
    by = load_template_patch("glm-4.6")
    shorter = replace(by, replacements=by.replacements[:1])
    assert patch_template(ORIGINAL, shorter, "x").text != PATCHED
    assert read_header(patch_file(whole, tmp_path / "o.gguf").path).metadata[KEY] == PATCHED


@pytest.mark.tools
def test_a_split_model_of_llama_cpp_takes_the_new_first_shard(tmp_path: Path) -> None:
    """Split so that the first shard holds no tensors, patched there, and put together again by llama.cpp itself."""
    tools = find_toolchain()
    write_stub_model(tmp_path / "whole.gguf", ORIGINAL, GLM.special_tokens)
    options = ["--split", "--no-tensor-first-split", "--split-max-tensors", "5"]
    tools.run(
        "llama-gguf-split", [*options, "whole.gguf", "old"], cwd=tmp_path, log=tmp_path / "log"
    )
    first, *others = sorted(tmp_path.glob("old-*.gguf"))
    assert read_header(first).tensors == () and others
    done = patch_file(first, tmp_path / "new" / first.name)
    assert done.path.stat().st_size < 10**5
    for other in others:
        other.rename(done.path.with_name(other.name))
    tools.run(
        "llama-gguf-split",
        ["--merge", done.path, "merged.gguf"],
        cwd=tmp_path,
        log=tmp_path / "log",
    )
    merged = read_header(tmp_path / "merged.gguf")
    assert merged.metadata[KEY] == PATCHED
    assert merged.hash_tensors() == read_header(tmp_path / "whole.gguf").hash_tensors()


@pytest.mark.tools
def test_gguf_py_reads_what_was_written(tmp_path: Path) -> None:
    write_stub_model(tmp_path / "a.gguf", GGMLS, GLM.special_tokens)
    paths = (tmp_path / "a.gguf", patch_file(tmp_path / "a.gguf", tmp_path / "b.gguf").path)
    before, after = (gguf.GGUFReader(path) for path in paths)
    assert list(before.fields) == list(after.fields)
    assert [(t.name, t.data.tobytes()) for t in before.tensors] == [
        (t.name, t.data.tobytes()) for t in after.tensors
    ]
