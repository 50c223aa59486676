import hashlib
import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from quant.core import files
from quant.core.errors import InputError
from quant.core.store import Store
from quant.hub import checkpoint
from quant.hub.checkpoint import ModelSource

TOKEN = "hf_ThisIsNobodysToken"
REPO = "org/tiny"
RECIPE = """
name = "tiny"
title = "tiny"
template = "none"
variants = ["BF16"]
source = {repo = "org/tiny"}
sampling = {temperature = 1.0, top_p = 0.95, top_k = 40}
ollama = {num_ctx = 4096, stop = []}
card = {license = "mit", languages = ["en"]}
smoke = [{say = "Hello!", expect = "."}]
"""


def safetensors(elements: int, name: str = "x") -> bytes:
    """A sound file with one tensor of bytes."""
    header = json.dumps(
        {name: {"dtype": "U8", "shape": [elements], "data_offsets": [0, elements]}}
    ).encode()
    return (
        struct.pack("<Q", len(header))
        + header
        + (bytes(range(251)) * (elements // 251 + 1))[:elements]
    )


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CHECKPOINT: Mapping[str, bytes] = {
    "config.json": b'{"architectures": ["Glm4MoeForCausalLM"]}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    SHARDS[0]: safetensors(1000, "a"),
    SHARDS[1]: safetensors(2000, "b"),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    ).encode(),
}
NEVER: Mapping[str, bytes] = {
    "README.md": b"# Tiny",
    "pytorch_model.bin": b"code that runs when it is loaded",
    "training_args.bin": b"code that runs when it is loaded",
    "original/consolidated.safetensors": safetensors(10),
}
"""What a repo may hold beside the checkpoint."""


def lay(folder: Path, changes: Mapping[str, bytes | None] | None = None) -> Path:
    """A folder with the checkpoint, but for the changes; None takes a file away."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {**CHECKPOINT, **(changes or {})}.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def problems(folder: Path) -> str:
    return "\n".join(checkpoint.find_checkpoint_problems(folder))


# A checkpoint in a folder


def test_a_sound_folder_has_no_problems(tmp_path: Path) -> None:
    assert problems(lay(tmp_path)) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config.json": None},
            "config.json: missing; expected the configuration of a Hugging Face checkpoint",
        ),
        ({"config.json": b"{"}, "config.json: expected JSON, found something else"),
        ({"config.json": b"\x84"}, "config.json: expected JSON, found something else"),
        (
            {"config.json": b"{}"},
            "config.json: architectures: expected the name of the model's class, found none",
        ),
        (
            {"config.json": b"[]"},
            "config.json: architectures: expected the name of the model's class, found none",
        ),
        (
            {"config.json": b'{"architectures": ["X"], "auto_map": {"AutoModel": "evil.X"}}'},
            "config.json: auto_map: expected a model that transformers knows, found one that brings code of its own",
        ),
        (
            {"tokenizer.json": None},
            "expected a tokenizer (tokenizer.json or tokenizer.model or vocab.json), found none",
        ),
        (
            {SHARDS[1]: None},
            f"{SHARDS[1]}: missing; model.safetensors.index.json says that it holds tensors",
        ),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../secret.safetensors"}}'},
            "weight_map: expected the name of a safetensors file beside it, found '../secret.safetensors'",
        ),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}'},
            "weight_map: expected the name of a safetensors file beside it, found 'pytorch_model.bin'",
        ),
        (
            {"model.safetensors.index.json": b"[]"},
            "weight_map: expected a map from tensors to files",
        ),
        (
            {SHARDS[0]: b""},
            f"{SHARDS[0]}: expected a safetensors header, found a file of 0 bytes without a whole one",
        ),
        ({SHARDS[0]: b"<html>Please log in</html>"}, f"{SHARDS[0]}: expected a safetensors header"),
        (
            {SHARDS[0]: struct.pack("<Q", 2) + b"[]"},
            f"{SHARDS[0]}: expected a safetensors header, found something else",
        ),
        (
            {
                SHARDS[0]: struct.pack("<Q", 53)
                + b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
                + b"ab"
            },
            f"{SHARDS[0]}: not a sound safetensors file",
        ),
    ],
)
def test_a_problem_names_the_file_what_was_expected_and_what_was_found(
    tmp_path: Path, changes: Mapping[str, bytes | None], message: str
) -> None:
    actual = problems(lay(tmp_path, changes))
    assert message in actual
    assert str(tmp_path) in actual
    assert len(actual.splitlines()) == 1


def test_weights_in_pickles_are_refused_by_name(tmp_path: Path) -> None:
    changes = {
        SHARDS[0]: None,
        SHARDS[1]: None,
        "model.safetensors.index.json": None,
        "pytorch_model.bin": b"x",
    }
    assert "found only pytorch_model.bin, which can run code when it is loaded" in problems(
        lay(tmp_path, changes)
    )


def test_a_truncated_file_is_reported_with_both_lengths_and_the_last_tensor(tmp_path: Path) -> None:
    whole = CHECKPOINT[SHARDS[1]]
    actual = problems(lay(tmp_path, {SHARDS[1]: whole[:-500]}))
    assert (
        f"{SHARDS[1]}: expected {len(whole)} bytes (the last tensor is b), found {len(whole) - 500}"
        in actual
    )


def test_a_file_with_bytes_after_its_tensors_is_refused(tmp_path: Path) -> None:
    whole = CHECKPOINT[SHARDS[1]]
    assert f"expected {len(whole)} bytes" in problems(lay(tmp_path, {SHARDS[1]: whole + b"more"}))


def test_all_problems_of_a_folder_are_reported_at_once(tmp_path: Path) -> None:
    folder = lay(
        tmp_path, {"config.json": b"{}", "tokenizer.json": None, SHARDS[0]: b"x", SHARDS[1]: None}
    )
    with pytest.raises(InputError) as e:
        checkpoint.read_checkpoint(folder)
    assert len(e.value.problems) == 4


@pytest.mark.parametrize(
    ("kind", "actual"), [("file", "found a file"), ("nothing", "found nothing")]
)
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, kind: str, actual: str) -> None:
    path = tmp_path / "checkpoint"
    if kind == "file":
        path.write_text("")
    assert problems(path) == f"{path}: expected a folder with a checkpoint, {actual}"


def test_a_relative_folder_begins_beside_the_recipe(tmp_path: Path) -> None:
    lay(tmp_path / "recipes" / "weights")
    actual = checkpoint.pull_checkpoint(
        ModelSource(folder="weights"), tmp_path / "recipes", Store(tmp_path / "work")
    )
    assert actual.folder == tmp_path / "recipes" / "weights"
    assert actual.origin == {"folder": "weights"}


def test_receipts_name_what_a_conversion_can_read_and_nothing_else(tmp_path: Path) -> None:
    actual = checkpoint.read_checkpoint(
        lay(tmp_path, {"README.md": b"# Tiny", "training_args.bin": b"x"})
    )
    assert {r.path: (r.sha256, r.bytes) for r in actual.receipts} == {
        name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in CHECKPOINT.items()
    }


@pytest.mark.parametrize(
    ("changes", "text", "where"),
    [
        ({}, "{{ messages }}", "tokenizer_config.json: chat_template"),
        (
            {"chat_template.jinja": b"other"},
            "{{ messages }}",
            "tokenizer_config.json: chat_template",
        ),
        (
            {"tokenizer_config.json": b"{}", "chat_template.jinja": b"other"},
            "other",
            "chat_template.jinja",
        ),
        (
            {"tokenizer_config.json": None, "chat_template.jinja": b"other"},
            "other",
            "chat_template.jinja",
        ),
    ],
)
def test_the_chat_template_is_the_one_that_the_converter_uses(
    tmp_path: Path, changes: Mapping[str, bytes | None], text: str, where: str
) -> None:
    assert checkpoint.read_checkpoint(lay(tmp_path, changes)).chat_template == (
        text,
        str(tmp_path / where),
    )


def test_a_checkpoint_may_lack_a_chat_template(tmp_path: Path) -> None:
    assert (
        checkpoint.read_checkpoint(
            lay(tmp_path, {"tokenizer_config.json": b'{"chat_template": [{"name": "x"}]}'})
        ).chat_template
        is None
    )


# Digests that are remembered


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read to the end, as they are read."""
    names: list[str] = []
    digest = files.hash_file

    def counting(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(files, "hash_file", counting)
    return names


def test_digests_are_remembered(tmp_path: Path, hashed: list[str]) -> None:
    folder, store = lay(tmp_path / "checkpoint"), Store(tmp_path / "work")
    first = checkpoint.read_checkpoint(folder, store)
    assert sorted(hashed) == sorted(CHECKPOINT)
    hashed.clear()
    assert checkpoint.read_checkpoint(folder, store) == first
    assert hashed == []


def test_a_changed_file_is_read_again_even_with_its_length_and_time_set_back(
    tmp_path: Path, hashed: list[str]
) -> None:
    folder, store = lay(tmp_path / "checkpoint"), Store(tmp_path / "work")
    first = checkpoint.read_checkpoint(folder, store)
    hashed.clear()
    path = folder / SHARDS[0]
    before = path.stat()
    time.sleep(0.02)  # the clock of file systems ticks every few milliseconds
    with path.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = checkpoint.read_checkpoint(folder, store)
    assert hashed == [SHARDS[0]]
    assert second.receipts != first.receipts


def test_a_damaged_digest_cache_is_written_anew(tmp_path: Path) -> None:
    folder, store = lay(tmp_path / "checkpoint"), Store(tmp_path / "work")
    first = checkpoint.read_checkpoint(folder, store)
    (store.root / checkpoint.DIGESTS).write_text("{")
    assert checkpoint.read_checkpoint(folder, store) == first
