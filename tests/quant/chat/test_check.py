"""`quant template check`: where a template is loaded from, and what the whole check reports."""

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
from quant.chat.families import SpecialTokens
from quant.chat.sandbox import SandboxLimits
from quant.core.errors import CheckError, InputError
from quant.core.store import Store
from quant.llama.toolchain import find_toolchain
from quant.plan.load import list_recipes, load_template_patch
from tests.gguf_files import LLAMA, key, write
from tests.quant.chat.templates import CONVERSATIONS, GLM, ORIGINALS, PATCHED, PATCHES, SHORT

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
    template = load_template(model)
    assert template.text.rstrip("\n") == PATCHED[family].rstrip("\n")
    assert template.patch is not None and template.patch.name == family
    if template.source.startswith(str(COLLECTION)):  # a checkpoint that is here has its own
        assert template.source == str(COLLECTION / file)
        assert template.original == ORIGINALS[family]


def test_the_template_of_a_checkpoint_folder_comes_first(tmp_path: Path) -> None:
    text = (
        (Path(__file__).parents[3] / RECIPE)
        .read_text()
        .replace('folder = "tiny-glm"', 'folder = "own"')
    )
    (tmp_path / "m.toml").write_text(text)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "chat_template.jinja").write_text(ORIGINALS["the authors' 4.6"])
    template = load_template(str(tmp_path / "m.toml"))
    assert template.source == str(tmp_path / "own" / "chat_template.jinja")
    assert (template.original, template.text) == (ORIGINALS["the authors' 4.6"], PATCHED["glm-4.6"])


@pytest.mark.parametrize(
    "model", sorted({*list_recipes("models")} - {"glm-4.6", "glm-4.7", "glm-4.7-flash", "tiny-glm"})
)
def test_a_model_without_a_template_here_is_refused_with_a_way_out(model: str) -> None:
    with pytest.raises(
        InputError, match="its chat template is not here; name a GGUF of the model instead"
    ):
        load_template(model)


def test_a_gguf_has_its_own_template_unpatched(tmp_path: Path) -> None:
    path = gguf(tmp_path / "a.gguf", ORIGINALS["glm-4.6"])
    template = load_template(str(path))
    assert (template.text, template.original, template.patch) == (ORIGINALS["glm-4.6"], None, None)
    assert template.tokens == SpecialTokens("b", "")
    assert load_template(str(path), "glm-4.6").text == PATCHED["glm-4.6"]
    assert load_template("glm-4.6", "none").text == ORIGINALS["glm-4.6"]


@pytest.mark.parametrize(
    ("named", "words"),
    [("nowhere.gguf", "nowhere.gguf: cannot be read"), ("glm-46", "did you mean 'glm-4.6'?")],
)
def test_a_missing_file_or_model_is_refused(named: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_template(named)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{% if %}", "(line 2, column 7)"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "longer than 0.2 s",
        ),
        ("{{ 'x' * (2 ** 40) }}", "more than 512 MiB"),
    ],
)
def test_a_template_that_renders_nothing_is_refused_in_one_line(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.chat.engines.SandboxLimits", lambda: SandboxLimits(seconds=0.2))
    template = load_template(str(gguf(tmp_path / "a.gguf", text)))
    with pytest.raises(InputError) as caught:
        check_template(template, None)
    [problem] = caught.value.problems
    assert problem.startswith(f"{template.source}: chat template: ") and words in problem
    assert "\n" not in problem and "not tried" not in problem


def test_a_build_requires_every_conversation_to_pass_and_renders_a_template_once(
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
    assert first.startswith(f"{wrong.source}: conversation '")
    assert "\n    --- " in str(caught.value) and "\n    -" in str(caught.value)  # and what differed
    problems = [
        p for p in caught.value.problems if "conversation 'raw reasoning, two turns' (jinja)" in p
    ]
    assert "thinking default, prompt 3: past stays: does not begin with past 2" in problems[0]
    names = {p.split("'")[1] for p in caught.value.problems[:-1]}
    assert (
        f"without a patch: expected {len(CONVERSATIONS)} conversations to pass, found {len(names)} that fail"
        in last
    )

    monkeypatch.setattr(
        "quant.chat.check.render_in_sandbox", lambda *_: pytest.fail("it was rendered again")
    )
    assert set(require_template(wrong, dict.fromkeys(names, "known"), store)) == names
    with pytest.raises(CheckError, match="found 1 that fail"):
        require_template(wrong, dict.fromkeys(names - {"raw reasoning, two turns"}, "known"), store)


@pytest.mark.tools
@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.7", "glm-4.7-flash", "tiny-glm"])
def test_every_model_passes_in_every_engine(model: str) -> None:
    report = check_template(load_template(model), find_toolchain() if model == "tiny-glm" else None)
    assert report.faults == ()
    assert report.passed and report.conversations == len(CONVERSATIONS)
    assert report.engines["jinja"] == report.engines["transformers"] > 600


@pytest.mark.tools
@pytest.mark.parametrize("name", ["glm-4.6v", "glm-5"])
def test_the_templates_of_the_twins_pass_in_every_engine(name: str) -> None:
    template = TemplateUnderTest(
        name,
        PATCHED[name],
        "beside the twin",
        GLM.special_tokens,
        GLM,
        ORIGINALS[name],
        load_template_patch(PATCHES[name]),
    )
    assert check_template(template, find_toolchain()).faults == ()


@pytest.mark.tools
def test_the_unpatched_template_fails_in_every_engine_that_shows_it() -> None:
    report = check_template(load_template("glm-4.6", "none"), find_toolchain(), SHORT)
    rules = {(f.engine, f.rule, f.conversation) for f in report.faults}
    assert rules == {
        ("jinja", "past stays", "raw reasoning, two turns"),
        ("jinja", "tool results", "a result as parts"),
        ("llama-server", "engines agree", "a result as parts"),
    }
    assert not report.passed
    assert report.engines == {"jinja": 27, "transformers": 27, "llama-server": 10}


@pytest.mark.tools
@pytest.mark.skipif(importlib.util.find_spec("gotpl") is None, reason="gotpl is not installed")
def test_the_template_for_ollama_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_template(load_template("glm-4.6"), None, SHORT).engines["ollama"] == 6
    monkeypatch.setattr("quant.chat.go_template.load_go_template", lambda name: "{{ .Messages }}")
    report = check_template(load_template("glm-4.6"), None, SHORT)
    assert {(f.engine, f.rule) for f in report.faults} == {("ollama", "engines agree")}


@pytest.mark.tools
def test_a_change_that_the_patch_does_not_list_is_a_fault(tmp_path: Path) -> None:
    patch = Path(__file__).parents[3] / "recipes" / "templates" / "glm-4.6.toml"
    (tmp_path / "p.toml").write_text(patch.read_text().replace('"a result as parts", ', ""))
    report: TemplateReport = check_template(
        load_template("glm-4.6", str(tmp_path / "p.toml")), None, SHORT
    )
    assert {(f.rule, f.conversation) for f in report.faults} == {
        ("as the original", "a result as parts")
    }
    assert report.json()["faults"][0]["diff"]
