"""The calibration text: every document in the model's own words, always in the same order."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.documents import Document
from quant import toolchain
from quant.calibrate import CalibrationText, as_read
from quant.calibrate import calibrate as calibrate_with
from quant.convert import Base
from quant.errors import InputError
from quant.imatrix import base_of
from quant.recipe import Model, load_model
from quant.rendering import Tokens, write_mute_model
from quant.store import Store
from quant.template import ChatTemplate

TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{{ '+' if enable_thinking else '-' }}{{ tools | length if tools else 'no tools' }}",
    "0",
)
MESSAGES: tuple[dict[str, Any], ...] = ({"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hi"})


def document(name: str = "a", **more: Any) -> Document:
    return replace(Document(name, "en", False, MESSAGES), **more)


def test_a_document_is_rendered_with_the_models_template() -> None:
    assert as_read(document(), TEMPLATE) == "[user]Grüße[assistant]Hi-no tools"
    assert as_read(document(thinking=True, tools=({}, {})), TEMPLATE) == "[user]Grüße[assistant]Hi+2"


def test_without_a_template_messages_are_paragraphs() -> None:
    silent = ({"role": "assistant", "content": None}, {"role": "assistant"})
    assert as_read(document(messages=(*MESSAGES, *silent)), None) == "Grüße\n\nHi\n\n\n\n"


def test_a_document_that_cannot_be_rendered_is_named() -> None:
    broken = ChatTemplate("{{ raise_exception('no') }}", "0")
    with pytest.raises(InputError, match=r"^calibration document greeting: chat template: cannot render .*: no"):
        as_read(document("greeting"), broken)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model that can only count its tokens."""
    path = tmp_path_factory.mktemp("base") / "mute.gguf"
    write_mute_model(path, TEMPLATE.text, Tokens())
    return base_of(path)


def calibrate(model: Model, template: ChatTemplate | None, base: Base, store: Store) -> CalibrationText:
    return calibrate_with(model, template, base, toolchain.find(), store)


def a_set(path: Path, *names: str) -> Path:
    path.write_text("".join(json.dumps({"id": n, "messages": [{"role": "user", "content": n}]}) + "\n" for n in names))
    return path


@pytest.mark.tools
def test_the_text_holds_every_document_and_is_made_once(base: Base, tmp_path: Path) -> None:
    path = a_set(tmp_path / "mine.jsonl", "one", "two", "three")
    model = replace(
        load_model("tiny-glm")[0], imatrix=replace(load_model("tiny-glm")[0].imatrix, calibration=str(path))
    )
    store = Store(tmp_path / "store")
    made = calibrate(model, TEMPLATE, base, store)
    text = made.path.read_text()
    assert (made.name, made.documents) == ("mine", 3)
    assert sorted(text.splitlines()) == [f"[user]{n}-no tools" for n in ("one", "three", "two")]
    assert made.receipt.bytes == len(text.encode())
    assert calibrate(model, TEMPLATE, base, store) == made
    assert len(list((tmp_path / "store" / "calibrate").iterdir())) == 1


@pytest.mark.tools
def test_another_template_or_another_set_is_another_text(base: Base, tmp_path: Path) -> None:
    path = a_set(tmp_path / "mine.jsonl", "one")
    model = replace(
        load_model("tiny-glm")[0], imatrix=replace(load_model("tiny-glm")[0].imatrix, calibration=str(path))
    )
    store = Store(tmp_path / "store")
    made = [calibrate(model, TEMPLATE, base, store), calibrate(model, None, base, store)]
    a_set(path, "one", "two")
    made.append(calibrate(model, TEMPLATE, base, store))
    assert len({m.path for m in made}) == 3


@pytest.mark.tools
def test_the_order_does_not_depend_on_the_files(base: Base, tmp_path: Path) -> None:
    names = [f"n{n}" for n in range(20)]
    texts = []
    for order in (names, names[::-1]):
        path = a_set(tmp_path / "mine.jsonl", *order)
        model = load_model("tiny-glm")[0]
        model = replace(model, imatrix=replace(model.imatrix, calibration=str(path)))
        texts.append(calibrate(model, TEMPLATE, base, Store(tmp_path / f"store-{order[0]}")).path.read_text())
    assert texts[0] == texts[1]
    assert [line[len("[user]") : -len("-no tools")] for line in texts[0].splitlines()] != names  # mixed
