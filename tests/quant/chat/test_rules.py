"""Rules for chat templates: patched templates keep them all, and each defect is caught by its rule."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.chat.check import COLLECTION
from quant.chat.conversations import build_conversations
from quant.chat.families import find_family
from quant.chat.messages import Conversation, Message, assistant, user
from quant.chat.renderings import Rendering, collect_reasoning, list_requests
from quant.chat.rules import (
    find_changes,
    find_disagreements,
    find_faults,
    format_diff,
)
from quant.chat.template import patch_template, render_template
from quant.plan.load import list_recipes, load_model, load_template_patch
from tests.models.templates import PICTURE
from tests.quant.chat.templates import (
    CONVERSATIONS,
    FILES,
    GLM,
    ORIGINALS,
    PATCHED,
    PATCHES,
    RENDERED,
    RENDERED_ORIGINALS,
    render_all,
)

TEMPLATE_OF_MODEL = {
    "glm-4.6": "glm-4.6",
    "tiny-glm": "the authors' 4.6",
    "glm-4.7": "glm-4.7",
    "glm-4.7-flash": "glm-4.7",
    "glm-4.6v-flash": "glm-4.6v",
    "glm-5": "glm-5",
}
"""The template that every model of the recipes is tested with."""
INTENDED = {
    name: [c for r in load_template_patch(PATCHES[name]).replacements for c in r.changes]
    for name in ORIGINALS
}
NAMES = [conversation.name for conversation in CONVERSATIONS]


def find_broken_rules(
    template: str, conversations: tuple[Conversation, ...] = CONVERSATIONS
) -> set[tuple[str, str]]:
    """Rules, and conversations that break them."""
    renderings = render_all(template, conversations)
    return {(f.rule, f.conversation) for f in find_faults(conversations, renderings, GLM)}


def test_there_are_many_conversations_and_each_has_a_name_of_its_own() -> None:
    assert len(CONVERSATIONS) >= 40
    assert len(set(NAMES)) == len(NAMES)
    assert len({request.name for request in list_requests(CONVERSATIONS)}) == len(
        list_requests(CONVERSATIONS)
    )


def test_the_conversations_have_every_form_of_message_that_clients_send() -> None:
    messages = [m for c in CONVERSATIONS for m in c.messages]
    calls = [call for m in messages for call in m.get("tool_calls", ())]
    questions = {sum(m["role"] == "user" for m in c.messages) for c in CONVERSATIONS}
    assert questions >= {1, 2, 3, 4, 5}
    assert {type(call["function"]["arguments"]) for call in calls} == {dict, str, type(None)}
    assert {type(m["content"]) for m in messages if m["role"] == "tool"} == {str, list}
    assert {type(m.get("content")) for m in messages if m["role"] == "assistant"} == {
        str,
        list,
        type(None),
    }
    assert any(c.toggled for c in CONVERSATIONS) and any(c.refused for c in CONVERSATIONS)
    assert any(len(m.get("tool_calls", ())) > 1 for m in messages)
    assert any("<|user|>" in m["content"] for m in messages if m["role"] == "user")


def test_every_mode_of_reasoning_is_requested() -> None:
    assert Counter(r.mode for r in list_requests(CONVERSATIONS)).keys() == {
        "default",
        "on",
        "off",
        "toggled",
        "toggled otherwise",
    }
    toggled = [
        r.thinking
        for r in list_requests(CONVERSATIONS)
        if r.conversation.name == "thinking toggled"
    ]
    assert toggled == [True, False, True, False, True, False, True, False, True, False]


@pytest.mark.parametrize("model", list_recipes("models"))
def test_every_model_recipe_names_the_patch_that_is_tested_here(model: str) -> None:
    assert load_model(model)[0].template == PATCHES[TEMPLATE_OF_MODEL[model]]


def test_an_image_is_rendered_in_place_of_its_part() -> None:
    parts = [
        {"type": "text", "text": "This: "},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "?"},
    ]
    prompt = render_template(
        PATCHED["glm-4.6v"], [user(parts)], add_generation_prompt=True, enable_thinking=False
    )
    assert prompt == f"[gMASK]<sop><|user|>\nThis: {PICTURE}?/nothink<|assistant|>\n<think></think>"


@pytest.mark.parametrize("name", PATCHED)
def test_a_patched_template_keeps_every_rule(name: str) -> None:
    assert list(find_faults(CONVERSATIONS, RENDERED[name], GLM)) == []


@pytest.mark.parametrize("name", PATCHED)
def test_a_patch_changes_the_conversations_that_it_lists_and_no_other(name: str) -> None:
    assert (
        list(find_changes(RENDERED_ORIGINALS[name], RENDERED[name], CONVERSATIONS, INTENDED[name]))
        == []
    )


@pytest.mark.parametrize("name", ["the authors' 4.6", "glm-4.7", "glm-4.6v", "glm-5"])
def test_every_conversation_that_a_patch_lists_does_change(name: str) -> None:
    changed = {
        f.conversation
        for f in find_changes(RENDERED_ORIGINALS[name], RENDERED[name], CONVERSATIONS, ())
    }
    assert changed == set(INTENDED[name]) <= set(NAMES)


@pytest.mark.parametrize("name", ["the authors' 4.6", "glm-4.7", "glm-4.6v", "glm-5"])
def test_the_original_breaks_these_rules(name: str) -> None:
    unpatched = (
        {("past stays", "raw reasoning kept by wish")} if PATCHES[name] != "glm-4.7" else set()
    )  # 4.6 has no such variable
    assert find_broken_rules(ORIGINALS[name]) == unpatched | {
        *(
            ("past stays", f"raw reasoning{which}")
            for which in (", two turns", ", four turns", " of many lines", " without its beginning")
        ),
        *(
            ("tool results", which)
            for which in (
                "a result as parts",
                "a result as several parts",
                "results of two calls, one as parts",
            )
        ),
        ("no None", "a call, content null"),
        ("no None", "an answer of null"),
        ("renders", "a call, arguments null"),
        ("refuses", "a call, arguments a list"),
    }


@pytest.mark.parametrize("name", PATCHED)
def test_every_replacement_fixes_a_conversation_or_an_older_engine(name: str) -> None:
    """Without one replacement a conversation fails, but for the one that older engines need to parse the text."""
    by = load_template_patch(PATCHES[name])
    for n, left_out in enumerate(by.replacements):
        rest = replace(by, replacements=tuple(r for r in by.replacements if r is not left_out))
        failing = {
            conversation
            for _, conversation in find_broken_rules(
                patch_template(ORIGINALS[name], rest, "x").text
            )
        }
        if name == "glm-4.6" and n == 2:
            assert not failing  # ggml has made this change in its copy
        else:
            assert failing <= set(left_out.changes)
            assert bool(failing) == bool(left_out.changes)


SOME = (
    "one turn",
    "system first",
    "reasoning apart, two turns",
    "raw reasoning, two turns",
    "a call, arguments as object",
    "a call, arguments null",
    "a call, arguments a list",
    "a call, content null",
    "a call with reasoning, answered",
    "a result as parts",
    "a result as several parts",
)
"""Enough conversations to catch every defect, so that a defect costs a tenth of a second."""
DEFECTS = {
    # defect: text of the template, its replacement, the rule that catches it
    "no generation prompt": (
        "{%- if add_generation_prompt -%}",
        "{%- if false -%}",
        "generation prompt",
    ),
    "the beginning twice": ("[gMASK]<sop>", "[gMASK]<sop>[gMASK]<sop>", "one start"),
    "the beginning is missing": ("[gMASK]<sop>", "", "one start"),
    "no content comes out as a word": (
        "{%- elif content is not none and content is defined -%}",
        "{%- else -%}",
        "no None",
    ),
    "old reasoning is kept": ("loop.index0 > ns.last_user_index", "true", "old reasoning"),
    "reasoning in a tool loop is lost": (
        "loop.index0 > ns.last_user_index",
        "false",
        "old reasoning",
    ),
    "results are lost": ("{{- m.content }}\n", "", "tool results"),
    "parts of results are lost": ("tr.text if tr.text is defined else tr", "''", "tool results"),
    "parts of results as source": ("tr.text if tr.text is defined else tr", "tr", "tool results"),
    "the past is rewritten": ("{%- if m.tool_calls", "{%- if true or m.tool_calls", "past stays"),
    "thinking cannot be switched": (
        "enable_thinking is defined and not enable_thinking",
        "false",
        "thinking switch",
    ),
    "thinking is off unless asked for": (
        "enable_thinking is defined and not",
        "not",
        "thinking switch",
    ),
    "systems are lost": ("m.role == 'system'", "m.role == 'sys'", "nothing lost"),
    "answers are lost": ("{%- if content.strip() -%}", "{%- if false -%}", "nothing lost"),
    "prompts depend on the end": (
        "{%- if add_gen",
        "{{ messages|length }}{%- if add_gen",
        "prompts grow",
    ),
    "calls without arguments crash": ("tc.arguments or {}", "tc.arguments", "renders"),
    "what is no call is taken for one": ("_args is not mapping", "false", "refuses"),
}


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught_by_name(defect: str, family: str) -> None:
    find, put, rule = DEFECTS[defect]
    assert find in PATCHED[family]
    conversations = tuple(c for c in CONVERSATIONS if c.name in SOME)
    assert rule in {
        broken for broken, _ in find_broken_rules(PATCHED[family].replace(find, put), conversations)
    }


def test_reasoning_lost_in_a_tool_loop_is_reported_as_such() -> None:
    template = PATCHED["glm-4.6"].replace("loop.index0 > ns.last_user_index", "false")
    details = [f.detail for f in find_faults(CONVERSATIONS, render_all(template), GLM)]
    assert "reasoning inside a tool loop is missing: 'I must look.'" in details


def test_a_template_of_another_family_is_not_held_to_what_glm_does() -> None:
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = lines + "{% if add_generation_prompt %}assistant:{% endif %}"
    family = find_family(template)
    conversations = tuple(
        c
        for c in build_conversations(family)
        if c.name in ("one turn", "five turns", "system first")
    )
    assert len(conversations) == 3
    renderings = render_all(template, conversations)
    assert list(find_faults(conversations, renderings, family)) == []
    assert {f.rule for f in find_faults(conversations, renderings, GLM)} == {
        "one start",
        "thinking switch",
    }


def test_an_engine_with_different_text_is_reported_with_the_diff() -> None:
    ours = RENDERED["glm-4.6"]
    request = list_requests(CONVERSATIONS)[0]
    theirs = {request.name: Rendering(str(ours[request.name].text).replace("Hello", "Hallo"))}
    [fault] = find_disagreements("other", theirs, ours, CONVERSATIONS)
    assert (fault.rule, fault.engine, fault.conversation) == ("engines agree", "other", "one turn")
    assert "-Hello, who is there?<|assistant|>\n+Hallo, who is there?<|assistant|>" in fault.diff
    assert (
        list(find_disagreements("other", {request.name: ours[request.name]}, ours, CONVERSATIONS))
        == []
    )


def test_an_engine_that_refuses_or_fails_to_refuse_is_reported() -> None:
    ours = RENDERED["glm-4.6"]
    wrong = {"one turn, thinking default, prompt 1": Rendering(None, "HTTP 500")}
    wrong |= {"a call, arguments a list, thinking off, prompt 3": Rendering("text")}
    faults = [(f.rule, f.detail) for f in find_disagreements("other", wrong, ours, CONVERSATIONS)]
    assert faults == [
        ("engines agree", "refused: HTTP 500"),
        ("refuses", "expected the error 'Invalid tool call arguments passed', found a text"),
    ]


def test_a_change_that_no_replacement_lists_is_reported() -> None:
    ours, [request, *_] = RENDERED["glm-4.6"], list_requests(CONVERSATIONS)
    other = {**ours, request.name: Rendering("something else")}
    [fault] = find_changes(ours, other, CONVERSATIONS, ())
    assert (fault.rule, fault.conversation) == ("as the original", "one turn")
    assert "+something else" in fault.diff
    assert list(find_changes(ours, other, CONVERSATIONS, ["one turn"])) == []


def test_a_long_diff_is_cut() -> None:
    shown = format_diff("\n".join(map(str, range(99))), "", "a", "b").splitlines()
    assert len(shown) == 31
    assert shown[-1].endswith("more lines")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (assistant("Yes.", reasoning=" Hm. "), "Hm."),
        (assistant("<think>\nHm.\n</think>\nYes."), "Hm."),
        (assistant("Hm.</think>Yes."), "Hm."),
        (assistant("Yes."), ""),
        (assistant(None), ""),
        (user("<think>Hm.</think>"), ""),
        (assistant("<think>no</think>", reasoning=""), ""),
    ],
)
def test_reasoning_is_collected_from_both_places_where_clients_keep_it(
    message: Message, expected: str
) -> None:
    assert collect_reasoning(message, GLM.reasoning) == expected


@pytest.mark.parametrize("name", sorted(set(GLM.collected_templates.values())))
def test_every_template_that_a_family_names_is_in_the_collection(name: str) -> None:
    assert (COLLECTION / name).is_file()


def as_text(family: str) -> str:
    """The whole prompts of a family: what a golden file holds."""
    shown: list[Any] = []
    for request in list_requests(CONVERSATIONS):
        rendering = RENDERED[family][request.name]
        whole = request.kind == "prompt" and request.upto == len(request.conversation.messages)
        if (
            whole
            and request.mode != "on"
            and not (request.conversation.tools and request.mode == "off")
        ):
            shown += [f"=== {request.name}", rendering.text or f"refused: {rendering.error}", ""]
    return "\n".join(shown)


GOLDEN = Path(__file__).parents[2] / "golden" / "templates"


@pytest.mark.parametrize("family", FILES)
def test_prompts_are_the_same_as_before(family: str, pytestconfig: pytest.Config) -> None:
    path = GOLDEN / f"{family}.txt"
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_text(family).encode())
    assert path.exists(), f"{path}: missing; pytest --update-golden writes it"
    assert as_text(family) == path.read_bytes().decode()
