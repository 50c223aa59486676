"""Families of models: what is written down, and what a template tells by itself."""

import json
from pathlib import Path

import pytest

from quant.chat import families
from quant.chat.check import COLLECTION
from quant.chat.conversations import CONVERSATIONS, build_conversations
from quant.chat.families import (
    SpecialTokens,
    find_family,
    find_file_family,
    load_family,
    read_checkpoint_tokens,
)
from quant.chat.gguf_patch import KEY
from quant.core.errors import InputError
from quant.llama.gguf import read_header
from quant.plan.load import RECIPES, list_recipes, load_model
from tests.gguf_files import LLAMA, key, write
from tests.quant.chat.templates import GLM, PATCHED


def collected(name: str) -> str:
    return (COLLECTION / f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", PATCHED)
def test_a_template_of_glm_is_recognized(name: str) -> None:
    assert find_family(PATCHED[name]) is GLM


@pytest.mark.parametrize("model", list_recipes("models"))
def test_a_model_without_its_template_is_recognized_by_its_architecture(model: str) -> None:
    recipe, _ = load_model(model)
    assert find_family(None, recipe.architecture["architectures"]) is GLM


def test_the_template_decides_before_the_architecture() -> None:
    assert find_family(collected("Qwen-Qwen3-0.6B"), ["Glm4MoeForCausalLM"]).name == ""


@pytest.mark.parametrize(
    ("name", "reasoning", "switch", "call", "token"),
    [
        ("Qwen-Qwen3-0.6B", "<think>", "enable_thinking", "<tool_call>", "<|im_start|>"),
        ("meta-llama-Llama-3.2-3B-Instruct", None, None, None, "<|start_header_id|>"),
        ("mistralai-Mistral-Nemo-Instruct-2407", None, None, None, "[INST]"),
        ("google-gemma-2-2b-it", None, None, None, "<start_of_turn>"),
        ("ByteDance-Seed-OSS", "<seed:think>", None, "<seed:tool_call>", "</s>"),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "[THINK]", None, None, "[INST]"),
    ],
)
def test_a_template_without_a_family_tells_its_markers(
    name: str, reasoning: str | None, switch: str | None, call: str | None, token: str
) -> None:
    family = find_family(collected(name), tokens=SpecialTokens("<s>", "</s>"))
    assert family.name == ""
    assert (family.reasoning.open if family.reasoning else None) == reasoning
    assert (family.reasoning.switch if family.reasoning else None) == switch
    assert (family.tool_calls.call_open if family.tool_calls else None) == call
    assert token in family.control_tokens
    assert set(family.control_tokens) <= set(family.forbidden_in_answers)
    assert family.special_tokens == SpecialTokens("<s>", "</s>")
    assert "glm" not in str(family).lower()


def test_a_file_of_no_family_takes_its_control_tokens_from_its_vocabulary(tmp_path: Path) -> None:
    tokens = ["<bos>", "<eos>", "<turn>", "<unused>", "word"]
    keys = [k for k in LLAMA if k.name != "tokenizer.ggml.tokens"]
    keys += [
        key(KEY, "{{ bos_token }}<turn>{{ messages }}"),
        key("tokenizer.ggml.tokens", tokens),
        key("tokenizer.ggml.token_type", [3, 3, 3, 3, 1]),
        key("tokenizer.ggml.bos_token_id", 0),
        key("tokenizer.ggml.eos_token_id", 1),
    ]
    family = find_file_family(read_header(write(tmp_path / "a.gguf", keys=keys)))
    assert family.control_tokens == ("<bos>", "<eos>", "<turn>")
    assert (family.bos_token, family.eos_token) == ("<bos>", "<eos>")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ("[gMASK]", "<|endoftext|>")),
        ({"bos_token": "<s>", "eos_token": None}, ("<s>", "<|endoftext|>")),
        ({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}, ("<s>", "</s>")),
    ],
)
def test_a_checkpoints_tokens_come_before_those_of_its_family(
    config: dict[str, object] | None, expected: tuple[str, str], tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_checkpoint_tokens(tmp_path, GLM) == SpecialTokens(*expected)


@pytest.mark.parametrize("text", ["{", "[]", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_broken_tokenizer_config_is_refused(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: expected"):
        read_checkpoint_tokens(tmp_path, GLM)


def test_a_model_without_markers_skips_the_conversations_that_need_them() -> None:
    names = {c.name for c in build_conversations(find_family("{{ messages }}"))}
    everything = {c.name for c in CONVERSATIONS}
    assert names < everything
    assert {"five turns", "several calls", "reasoning apart, two turns"} <= names
    assert not any("raw reasoning" in name or "nothink" in name for name in names)
    assert everything == {c.name for c in build_conversations(GLM)}


def test_no_placeholder_is_left_in_a_conversation() -> None:
    assert "⟦" not in repr(build_conversations(GLM))


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match="family 'gml' is not known: known are glm"):
        load_family("gml")


def test_a_family_without_markers_would_take_every_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "families").mkdir()
    text = (RECIPES / "families" / "glm.toml").read_text()
    marker = 'template_markers = ["<|observation|>"]'
    assert marker in text
    (tmp_path / "families" / "a.toml").write_text(text.replace(marker, "template_markers = []"))
    monkeypatch.setattr(families, "RECIPES", tmp_path)
    with pytest.raises(InputError, match=r"a\.toml: template_markers: expected at least one"):
        families.load_families.__wrapped__()
