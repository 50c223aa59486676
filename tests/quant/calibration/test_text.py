"""The calibration text: every document in the model's chat format, always in the same order."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.calibration.documents import Document
from quant.calibration.text import (
    CalibrationText,
    build_calibration_text,
    find_turn_marker,
    read_held_out_texts,
    render_document,
)
from quant.chat.families import load_family
from quant.chat.stub_model import write_stub_model
from quant.chat.template import ChatTemplate
from quant.core.errors import InputError
from quant.core.store import Store
from quant.llama import toolchain
from quant.llama.model_file import ModelFile
from quant.llama.tokenizer import Tokenizer
from quant.plan.load import load_model
from quant.plan.recipe import ModelRecipe
from tests.models.twins import TINY_GLM

GLM = load_family("glm")
GLM_TOKENS = GLM.special_tokens, GLM.control_tokens

TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{{ '+' if enable_thinking else '-' }}{{ tools | length if tools else 'no tools' }}",
    "0",
)
MESSAGES: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "Grüße"},
    {"role": "assistant", "content": "Hi"},
)


def document(name: str = "a", **more: Any) -> Document:
    return replace(Document(name, "en", False, MESSAGES), **more)


def test_a_document_is_rendered_with_the_models_template() -> None:
    assert render_document(document(), TEMPLATE) == "[user]Grüße[assistant]Hi-no tools"
    assert (
        render_document(document(thinking=True, tools=({}, {})), TEMPLATE)
        == "[user]Grüße[assistant]Hi+2"
    )


def test_without_a_template_messages_are_paragraphs() -> None:
    silent = ({"role": "assistant", "content": None}, {"role": "assistant"})
    assert render_document(document(messages=(*MESSAGES, *silent)), None) == "Grüße\n\nHi\n\n\n\n"


def test_a_document_that_cannot_be_rendered_is_named() -> None:
    broken = ChatTemplate("{{ raise_exception('no') }}", "0")
    with pytest.raises(
        InputError, match=r"^calibration document greeting: chat template: cannot render .*: no"
    ):
        render_document(document("greeting"), broken)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """A model that has a vocabulary and no weights."""
    path = tmp_path_factory.mktemp("base") / "mute.gguf"
    write_stub_model(path, TEMPLATE.text, *GLM_TOKENS)
    return ModelFile.open(path)


def build_text(
    model: ModelRecipe, template: ChatTemplate | None, base: ModelFile, store: Store
) -> CalibrationText:
    return build_calibration_text(model, template, base, toolchain.find_toolchain(), store)


def a_set(path: Path, *names: str) -> Path:
    path.write_text(
        "".join(
            json.dumps({"id": n, "messages": [{"role": "user", "content": n}]}) + "\n"
            for n in names
        )
    )
    return path


def of(path: Path, **more: Any) -> ModelRecipe:
    model = load_model("tiny-glm")[0]
    return replace(model, imatrix=replace(model.imatrix, calibration=str(path), **more))


@pytest.mark.tools
def test_the_text_has_every_document_that_is_not_held_out_and_is_made_once(
    base: ModelFile, tmp_path: Path
) -> None:
    names = [f"document number {n} with some words of its own like {n * n}" for n in range(60)]
    model, store = of(a_set(tmp_path / "mine.jsonl", *names)), Store(tmp_path / "store")
    result = build_text(model, TEMPLATE, base, store)
    text = result.path.read_text()
    assert result.held_out is not None
    held_out = read_held_out_texts(result.held_out)
    assert (
        result.name == "mine" and result.documents + len(held_out) == 60 and 0 < len(held_out) < 20
    )
    read = [line.removeprefix("[user]").removesuffix("-no tools") for line in text.splitlines()]
    assert sorted([*read, *(d.id for d in held_out)]) == sorted(names)
    assert not any(d.text.strip() in text for d in held_out)
    assert (
        read_held_out_texts(result.held_out, "mine") == held_out
        and read_held_out_texts(result.held_out, "other") == ()
    )
    assert result.receipt.bytes == len(text.encode())
    assert build_text(model, TEMPLATE, base, store) == result
    assert len(list((tmp_path / "store" / "calibrate").iterdir())) == 1


@pytest.mark.tools
def test_another_template_set_or_context_is_another_text(base: ModelFile, tmp_path: Path) -> None:
    path = a_set(tmp_path / "mine.jsonl", *map(str, range(20)))
    store = Store(tmp_path / "store")
    result = [build_text(of(path), TEMPLATE, base, store), build_text(of(path), None, base, store)]
    result.append(build_text(of(path, context=64), TEMPLATE, base, store))
    a_set(path, *map(str, range(21)))
    result.append(build_text(of(path), TEMPLATE, base, store))
    assert len({m.path for m in result}) == 4


@pytest.mark.tools
def test_the_same_set_is_rendered_to_the_same_bytes_whatever_the_order_of_its_lines(
    base: ModelFile, tmp_path: Path
) -> None:
    names = [f"n{n}" for n in range(20)]
    results = []
    for n, order in enumerate((names, names, names[::-1])):
        result = build_text(
            of(a_set(tmp_path / "mine.jsonl", *order)),
            TEMPLATE,
            base,
            Store(tmp_path / f"store-{n}"),
        )
        assert result.held_out is not None
        results.append((result.path.read_bytes(), result.held_out.read_bytes(), result.facts))
    assert results[0] == results[1] == results[2]
    lines = results[0][0].decode().splitlines()
    assert [line[len("[user]") : -len("-no tools")] for line in lines] != names  # mixed


@pytest.mark.tools
def test_near_duplicates_are_used_once(base: ModelFile, tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(100))
    path = a_set(tmp_path / "mine.jsonl", *(f"{words} {n}" for n in range(12)), "something else")
    result = build_text(of(path), TEMPLATE, base, Store(tmp_path / "store"))
    assert result.facts["near_duplicates"] == 11
    assert result.path.read_text().count(words) + result.facts["held_out"] <= 2


@pytest.mark.tools
def test_the_tokens_are_counted_and_chunks_begin_where_documents_begin(
    base: ModelFile, tmp_path: Path
) -> None:
    chance = random.Random(3)
    names = [
        f"{n} " + "x" * chance.randint(10, 200) + chance.choice("abc") * 30 + str(n)
        for n in range(300)
    ]
    marked = ChatTemplate("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", "0")
    result = build_text(
        of(a_set(tmp_path / "mine.jsonl", *names), context=256),
        marked,
        base,
        Store(tmp_path / "store"),
    )
    tokenizer = Tokenizer(base, toolchain.find_toolchain())
    ids, [user] = tokenizer.tokenize(result.path.read_text()), tokenizer.tokenize("<|user|>")
    assert result.tokens == len(ids)
    starts = [ids[n] == user for n in range(0, len(ids), 256)]
    assert starts.count(False) == result.facts["needless_cuts"]
    assert starts.count(True) > 0.4 * len(
        starts
    )  # were they taken as they come, one in a hundred would be


def test_the_user_turn_marker_is_found_in_templates_of_many_families() -> None:
    families = {
        "<|user|>\n": (TINY_GLM / "chat_template.jinja").read_text(),
        "<|im_start|>user\n": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "<u>": "{{ 'You are good.' }}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}",
        "": "{{ raise_exception('no') }}",
    }
    assert {
        marker: find_turn_marker(ChatTemplate(text, "0")) for marker, text in families.items()
    } == {m: m for m in families}
    assert find_turn_marker(None) == ""


@pytest.mark.tools
def test_every_document_that_a_template_refuses_is_named(base: ModelFile, tmp_path: Path) -> None:
    refusing = ChatTemplate(
        "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}", "0"
    )
    path = a_set(
        tmp_path / "mine.jsonl",
        *(f"good {n}" for n in range(9)),
        "bad one",
        "bad two",
        "bad three",
        "bad four",
    )
    with pytest.raises(InputError) as caught:
        build_text(of(path), refusing, base, Store(tmp_path / "store"))
    assert len(caught.value.problems) >= 2
    assert all(p.startswith("calibration document mine: bad ") for p in caught.value.problems)
