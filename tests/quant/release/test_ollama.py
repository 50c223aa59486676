"""What Ollama reads: parameters that it takes, and a Go template that says what the Jinja says."""

import importlib.util
from typing import Any

import pytest

from quant.chat.go_template import covers, load_go_template, render_go
from quant.chat.renderings import list_requests
from quant.chat.rules import find_disagreements
from quant.core.errors import InputError
from quant.plan.load import list_recipes, load_model
from quant.release.ollama import find_params_problems, make_params
from tests.quant.chat.templates import CONVERSATIONS, RENDERED

needs_gotpl = pytest.mark.skipif(
    importlib.util.find_spec("gotpl") is None, reason="gotpl is not installed"
)
COVERED = [ask for ask in list_requests(CONVERSATIONS) if covers(ask)]


@pytest.mark.parametrize("model", list_recipes("models"))
def test_ollama_takes_what_every_model_tells_it(model: str) -> None:
    assert list(find_params_problems(make_params(load_model(model)[0]))) == []


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (
            {"temprature": 1.0},
            "params: temprature: Ollama knows no such parameter: did you mean 'temperature'?",
        ),
        ({"stop": "<|user|>"}, "params: stop: expected an array of strings, found '<|user|>'"),
        ({"stop": ["a", 1]}, "params: stop: expected an array of strings, found ['a', 1]"),
        ({"stop": ["a", ""]}, "params: stop: expected an array of strings, found ['a', '']"),
        ({"num_ctx": 16384.0}, "params: num_ctx: expected a whole number, found 16384.0"),
        ({"num_ctx": True}, "params: num_ctx: expected a whole number, found True"),
        ({"top_k": "40"}, "params: top_k: expected a whole number, found '40'"),
        ({"top_p": "0.9"}, "params: top_p: expected a number, found '0.9'"),
        ({"top_p": True}, "params: top_p: expected a number, found True"),
        ({"min_p": float("nan")}, "params: min_p: expected a number, found nan"),
        ({"temperature": float("inf")}, "params: temperature: expected a number, found inf"),
        ({"use_mmap": 1}, "params: use_mmap: expected true or false, found 1"),
        ({"num_ctx": None}, "params: num_ctx: expected a whole number, found None"),
    ],
)
def test_what_ollama_would_not_take_is_named(params: dict[str, Any], problem: str) -> None:
    assert list(find_params_problems(params)) == [problem]


def test_all_problems_are_told_at_once_and_a_whole_number_is_a_number() -> None:
    assert (
        list(find_params_problems({"temperature": 1, "use_mmap": False, "stop": [], "seed": -1}))
        == []
    )
    assert len(list(find_params_problems({"a": 1, "stop": 1, "num_ctx": 1.5}))) == 3


def test_a_family_without_a_go_template_has_none() -> None:
    assert load_go_template("glm-4.7") is None
    assert load_go_template("none") is None


def test_the_go_template_is_one_that_ollama_finds_the_thinking_in() -> None:
    """Ollama reads the tags out of the words before and behind ``.Thinking``, in the range over the messages."""
    template = load_go_template("glm-4.6")
    assert template is not None and not template.endswith("\n")
    assert "<think>{{ .Thinking }}</think>" in template.split("range $i, $_ := .Messages")[2]


def test_plain_talk_is_covered_and_nothing_else() -> None:
    conversations = {ask.conversation.name for ask in COVERED}
    assert {
        "five turns",
        "system, five turns",
        "reasoning apart, four turns",
        "unicode",
        "thinking toggled",
    } <= conversations
    messages = [m for ask in COVERED for m in ask.messages]
    assert {type(m["content"]) for m in messages} == {str}
    assert {m["role"] for m in messages} == {"system", "user", "assistant"}
    assert not any(
        "</think>" in m["content"] or m.get("tool_calls")
        for m in messages
        if m["role"] == "assistant"
    )
    assert len(COVERED) > 150
    assert {ask.thinking for ask in COVERED} == {None, True, False}


def test_without_the_renderer_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("quant.chat.go_template.import_module", missing)
    with pytest.raises(InputError, match="gotpl: missing"):
        render_go("x", COVERED)


@needs_gotpl
def test_the_go_template_makes_the_same_prompts() -> None:
    prompts = render_go(load_go_template("glm-4.6") or "", list_requests(CONVERSATIONS))
    assert prompts.keys() == {ask.name for ask in COVERED}
    assert list(find_disagreements("ollama", prompts, RENDERED["glm-4.6"], CONVERSATIONS)) == []


@needs_gotpl
@pytest.mark.parametrize(
    ("find", "put", "conversation"),
    [
        ("<|assistant|>\n{{- if and .IsThinkSet", "{{- if and .IsThinkSet", "one turn"),
        ("(gt $i $last)", "true", "reasoning apart, two turns"),
        ("/nothink", "", "one turn"),
        ("[gMASK]<sop>", "", "one turn"),
        ("<|system|>\n", "<|system|>", "system first"),
    ],
)
def test_a_go_template_that_says_something_else_is_caught(
    find: str, put: str, conversation: str
) -> None:
    template = load_go_template("glm-4.6") or ""
    assert find in template
    prompts = render_go(template.replace(find, put), list_requests(CONVERSATIONS))
    assert conversation in {
        f.conversation
        for f in find_disagreements("ollama", prompts, RENDERED["glm-4.6"], CONVERSATIONS)
    }
