"""`quant template check`: where a template is found, and what the whole check says of it."""

import importlib.util
from pathlib import Path

import pytest

from quant.chat.check import (
    COLLECTION,
    TemplateReport,
    TemplateUnderTest,
    check_template,
    load_template,
    require_template,
)
from quant.chat.conversations import BATTERY
from quant.chat.engines import SpecialTokens
from quant.chat.sandbox import SandboxLimits
from quant.core.store import Store
from quant.errors import CheckError, InputError
from quant.llama.toolchain import find_toolchain
from quant.plan.load import list_recipes, load_template_patch
from tests.gguf_files import LLAMA, key, write
from tests.quant.chat.test_rules import ORIGINALS, PATCHED, PATCHES

FEW = tuple(
    c for c in BATTERY if c.name in ("one turn", "raw reasoning, two turns", "a result as parts")
)
RECIPE = Path("recipes") / "models" / "tiny-glm.toml"


def gguf(path: Path, template: str) -> Path:
    keys = [key("tokenizer.chat_template", template), key("tokenizer.ggml.bos_token_id", 1)]
    return write(path, keys=[*LLAMA, *keys])


@pytest.mark.parametrize(
    ("model", "file", "family"),
    [
        ("glm-4.6", "GLM-4.6.jinja", "glm-4.6"),
        ("tiny-glm", "GLM-4.6.jinja", "glm-4.6"),
        ("glm-4.7", "GLM-4.7-Flash.jinja", "glm-4.7"),
        ("glm-4.7-flash", "GLM-4.7-Flash.jinja", "glm-4.7"),
    ],
)
def test_a_model_has_the_patched_template(model: str, file: str, family: str) -> None:
    taken = load_template(model)
    assert taken.text.rstrip("\n") == PATCHED[family].rstrip("\n")
    assert taken.patch is not None and taken.patch.name == family
    if taken.where.startswith(str(COLLECTION)):  # a checkpoint that is here has its own
        assert taken.where == str(COLLECTION / file)
        assert taken.original == ORIGINALS[family]


def test_a_models_own_checkpoint_comes_first(tmp_path: Path) -> None:
    text = (
        (Path(__file__).parents[3] / RECIPE)
        .read_text()
        .replace('folder = "tiny-glm"', 'folder = "own"')
    )
    (tmp_path / "m.toml").write_text(text)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "chat_template.jinja").write_text(ORIGINALS["the authors' 4.6"])
    taken = load_template(str(tmp_path / "m.toml"))
    assert taken.where == str(tmp_path / "own" / "chat_template.jinja")
    assert (taken.original, taken.text) == (ORIGINALS["the authors' 4.6"], PATCHED["glm-4.6"])


@pytest.mark.parametrize(
    "model", sorted({*list_recipes("models")} - {"glm-4.6", "glm-4.7", "glm-4.7-flash", "tiny-glm"})
)
def test_a_model_whose_template_is_not_here_says_what_to_name_instead(model: str) -> None:
    with pytest.raises(
        InputError, match="its chat template is not here; name a GGUF of the model instead"
    ):
        load_template(model)


def test_a_file_has_what_stands_in_it(tmp_path: Path) -> None:
    path = gguf(tmp_path / "a.gguf", ORIGINALS["glm-4.6"])
    taken = load_template(str(path))
    assert (taken.text, taken.original, taken.patch) == (ORIGINALS["glm-4.6"], None, None)
    assert taken.tokens == SpecialTokens("b", "")
    assert load_template(str(path), "glm-4.6").text == PATCHED["glm-4.6"]
    assert load_template("glm-4.6", "none").text == ORIGINALS["glm-4.6"]


@pytest.mark.parametrize(
    ("named", "words"),
    [("nowhere.gguf", "nowhere.gguf: cannot be read"), ("glm-46", "did you mean 'glm-4.6'?")],
)
def test_what_is_not_there_is_said(named: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_template(named)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% if %}", "(line 2, column 7)"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "longer than 0.2 s",
        ),
        ("{{ 'x' * (2 ** 40) }}", "more than 512 MiB"),
    ],
)
def test_a_template_with_which_nothing_can_be_done_is_one_line(
    template: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.chat.engines.SandboxLimits", lambda: SandboxLimits(seconds=0.2))
    taken = load_template(str(gguf(tmp_path / "a.gguf", template)))
    with pytest.raises(InputError) as caught:
        check_template(taken, None)
    [problem] = caught.value.problems
    assert problem.startswith(f"{taken.where}: chat template: ") and words in problem
    assert "\n" not in problem and "not tried" not in problem


def test_a_template_that_a_build_begins_with_is_rendered_once_and_every_conversation_must_come_out_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, right, wrong = (
        Store(tmp_path),
        load_template("glm-4.6"),
        load_template("glm-4.6", "none"),
    )
    assert require_template(right, {}, store) == ()
    with pytest.raises(CheckError) as caught:
        require_template(wrong, {}, store)
    first, *_, last = caught.value.problems
    assert first.startswith(f"{wrong.where}: conversation '")
    assert "\n    --- " in str(caught.value) and "\n    -" in str(caught.value)  # and what differed
    said = [
        p for p in caught.value.problems if "conversation 'raw reasoning, two turns' (jinja)" in p
    ]
    assert "thinking default, prompt 3: past stays: it does not begin with past 2" in said[0]
    names = {p.split("'")[1] for p in caught.value.problems[:-1]}
    assert (
        f"as it is: expected {len(BATTERY)} conversations to come out right, found {len(names)} that do not"
        in last
    )

    monkeypatch.setattr(
        "quant.chat.check.render_in_sandbox", lambda *_: pytest.fail("it was rendered again")
    )
    assert set(require_template(wrong, dict.fromkeys(names, "known"), store)) == names
    with pytest.raises(CheckError, match="found 1 that do not"):
        require_template(wrong, dict.fromkeys(names - {"raw reasoning, two turns"}, "known"), store)


@pytest.mark.tools
@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.7", "glm-4.7-flash", "tiny-glm"])
def test_every_model_passes_in_every_engine(model: str) -> None:
    report = check_template(load_template(model), find_toolchain() if model == "tiny-glm" else None)
    assert report.faults == ()
    assert report.passed and report.conversations == len(BATTERY)
    assert report.engines["jinja"] == report.engines["transformers"] > 600


@pytest.mark.tools
@pytest.mark.parametrize("family", ["glm-4.6v", "glm-5"])
def test_a_template_that_is_written_beside_the_twin_passes_in_every_engine_too(family: str) -> None:
    by = load_template_patch(PATCHES[family])
    taken = TemplateUnderTest(
        family, PATCHED[family], "beside the twin", SpecialTokens(), ORIGINALS[family], by
    )
    assert check_template(taken, find_toolchain()).faults == ()


@pytest.mark.tools
def test_the_unpatched_template_fails_in_every_engine_that_shows_it() -> None:
    report = check_template(load_template("glm-4.6", "none"), find_toolchain(), FEW)
    found = {(f.engine, f.rule, f.conversation) for f in report.faults}
    assert found == {
        ("jinja", "past stays", "raw reasoning, two turns"),
        ("jinja", "tool results", "a result as parts"),
        ("llama-server", "engines agree", "a result as parts"),
    }
    assert not report.passed
    assert report.engines == {"jinja": 27, "transformers": 27, "llama-server": 10}


@pytest.mark.tools
@pytest.mark.skipif(importlib.util.find_spec("gotpl") is None, reason="gotpl is not installed")
def test_the_template_for_ollama_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_template(load_template("glm-4.6"), None, FEW).engines["ollama"] == 6
    monkeypatch.setattr("quant.chat.go_template.load_go_template", lambda name: "{{ .Messages }}")
    report = check_template(load_template("glm-4.6"), None, FEW)
    assert {(f.engine, f.rule) for f in report.faults} == {("ollama", "engines agree")}


@pytest.mark.tools
def test_a_change_that_the_patch_does_not_name_is_a_fault(tmp_path: Path) -> None:
    patch = Path(__file__).parents[3] / "recipes" / "templates" / "glm-4.6.toml"
    (tmp_path / "p.toml").write_text(patch.read_text().replace('"a result as parts", ', ""))
    report: TemplateReport = check_template(
        load_template("glm-4.6", str(tmp_path / "p.toml")), None, FEW
    )
    assert {(f.rule, f.conversation) for f in report.faults} == {
        ("as the original", "a result as parts")
    }
    assert report.json()["faults"][0]["diff"]
