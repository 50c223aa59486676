"""The rules for chat templates: what the project's patches make keeps them all, and each way to break one is caught by name."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.chat.check import COLLECTED, COLLECTION
from quant.chat.conversations import BATTERY, Conversation, Message, said, thought, user
from quant.chat.engines import as_a_server_does
from quant.chat.rules import (
    Rendering,
    Renderings,
    RenderRequest,
    collect_reasoning,
    find_changes,
    find_disagreements,
    find_faults,
    format_diff,
    list_requests,
)
from quant.chat.template import patch_template, render_template
from quant.errors import InputError
from quant.plan.load import list_recipes, load_model, load_template_patch
from tests.models.templates import PICTURE, authors_glm_4_6, glm_4_6v, glm_5

FAMILIES = {"glm-4.6": "GLM-4.6.jinja", "glm-4.7": "GLM-4.7-Flash.jinja"}
ORIGINALS = {name: (COLLECTION / file).read_text() for name, file in FAMILIES.items()}
ORIGINALS |= {"the authors' 4.6": authors_glm_4_6(), "glm-4.6v": glm_4_6v(), "glm-5": glm_5()}
PATCHES = {
    "glm-4.6": "glm-4.6",
    "glm-4.7": "glm-4.7",
    "the authors' 4.6": "glm-4.6",
    "glm-4.6v": "glm-4.6",
    "glm-5": "glm-4.7",
}
FAMILY = {
    "glm-4.6": "glm-4.6",
    "tiny-glm": "the authors' 4.6",
    "glm-4.7": "glm-4.7",
    "glm-4.7-flash": "glm-4.7",
    "glm-4.6v-flash": "glm-4.6v",
    "glm-5": "glm-5",
}
"""The template that every model of the recipes is tested with."""
PATCHED = {
    name: patch_template(text, load_template_patch(PATCHES[name]), name).text
    for name, text in ORIGINALS.items()
}
MEANT = {
    name: [c for r in load_template_patch(PATCHES[name]).replacements for c in r.changes]
    for name in ORIGINALS
}
NAMES = [conversation.name for conversation in BATTERY]


def made_by(template: str, battery: tuple[Conversation, ...] = BATTERY) -> Renderings:
    """What Jinja makes of the battery, here and now."""

    def one(ask: RenderRequest) -> Rendering:
        messages, tools = as_a_server_does(ask.messages), list(ask.conversation.tools) or None
        try:
            return Rendering(render_template(template, messages, tools=tools, **ask.variables))
        except InputError as e:
            return Rendering(None, str(e))

    return {ask.name: one(ask) for ask in list_requests(battery)}


MADE = {name: made_by(template) for name, template in PATCHED.items()}
BEFORE = {name: made_by(template) for name, template in ORIGINALS.items()}


def broken(template: str, battery: tuple[Conversation, ...] = BATTERY) -> set[tuple[str, str]]:
    """Rules, and conversations that break them."""
    return {
        (f.rule, f.conversation) for f in find_faults(battery, made_by(template, battery), template)
    }


def test_the_battery_is_large_and_every_conversation_has_its_name() -> None:
    assert len(BATTERY) >= 40
    assert len(set(NAMES)) == len(NAMES)
    assert len({ask.name for ask in list_requests(BATTERY)}) == len(list_requests(BATTERY))


def test_the_battery_says_what_clients_say() -> None:
    messages = [m for c in BATTERY for m in c.messages]
    calls = [call for m in messages for call in m.get("tool_calls", ())]
    questions = {sum(m["role"] == "user" for m in c.messages) for c in BATTERY}
    assert questions >= {1, 2, 3, 4, 5}
    assert {type(call["function"]["arguments"]) for call in calls} == {dict, str, type(None)}
    assert {type(m["content"]) for m in messages if m["role"] == "tool"} == {str, list}
    assert {type(m.get("content")) for m in messages if m["role"] == "assistant"} == {
        str,
        list,
        type(None),
    }
    assert any(c.toggled for c in BATTERY) and any(c.refused for c in BATTERY)
    assert any(len(m.get("tool_calls", ())) > 1 for m in messages)
    assert any("<|user|>" in m["content"] for m in messages if m["role"] == "user")


def test_every_mode_of_thinking_is_asked_for() -> None:
    assert Counter(a.mode for a in list_requests(BATTERY)).keys() == {
        "default",
        "on",
        "off",
        "toggled",
        "toggled otherwise",
    }
    toggled = [
        a.thinking for a in list_requests(BATTERY) if a.conversation.name == "thinking toggled"
    ]
    assert toggled == [True, False, True, False, True, False, True, False, True, False]


@pytest.mark.parametrize("model", list_recipes("models"))
def test_every_model_has_a_template_here_and_the_patch_that_it_is_tested_with(model: str) -> None:
    assert load_model(model)[0].template == PATCHES[FAMILY[model]]


def test_a_picture_stands_where_its_part_stands() -> None:
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
    assert list(find_faults(BATTERY, MADE[name], PATCHED[name])) == []


@pytest.mark.parametrize("name", PATCHED)
def test_a_patch_changes_what_it_says_and_nothing_else(name: str) -> None:
    assert list(find_changes(BEFORE[name], MADE[name], BATTERY, MEANT[name])) == []


@pytest.mark.parametrize("name", ["the authors' 4.6", "glm-4.7", "glm-4.6v", "glm-5"])
def test_everything_that_a_patch_says_it_changes_does_change(name: str) -> None:
    found = {f.conversation for f in find_changes(BEFORE[name], MADE[name], BATTERY, ())}
    assert found == set(MEANT[name]) <= set(NAMES)


@pytest.mark.parametrize("name", ["the authors' 4.6", "glm-4.7", "glm-4.6v", "glm-5"])
def test_the_original_breaks_the_rules_and_is_told_where(name: str) -> None:
    kept = (
        {("past stays", "raw reasoning kept by wish")} if PATCHES[name] != "glm-4.7" else set()
    )  # 4.6 knows no such wish
    assert broken(ORIGINALS[name]) == kept | {
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
def test_every_replacement_mends_a_conversation_or_an_older_engine(name: str) -> None:
    """Without one of the replacements the battery fails, but for the one that older engines need to parse the text."""
    by = load_template_patch(PATCHES[name])
    for n, left_out in enumerate(by.replacements):
        rest = replace(by, replacements=tuple(r for r in by.replacements if r is not left_out))
        found = {
            conversation
            for _, conversation in broken(patch_template(ORIGINALS[name], rest, "x").text)
        }
        if name == "glm-4.6" and n == 2:
            assert not found  # ggml has made this change in its copy
        else:
            assert found <= set(left_out.changes)
            assert bool(found) == bool(left_out.changes)


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
"""Enough of the battery to catch every defect, so that a defect costs a tenth of a second."""
DEFECTS = {
    # what is wrong: what stands in the template, what is put there, the rule that tells
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught_by_name(defect: str, family: str) -> None:
    find, put, rule = DEFECTS[defect]
    assert find in PATCHED[family]
    battery = tuple(c for c in BATTERY if c.name in SOME)
    assert rule in {found for found, _ in broken(PATCHED[family].replace(find, put), battery)}


def test_reasoning_lost_in_a_tool_loop_is_told_as_such() -> None:
    template = PATCHED["glm-4.6"].replace("loop.index0 > ns.last_user_index", "false")
    found = [f.detail for f in find_faults(BATTERY, made_by(template), template)]
    assert "reasoning inside a tool loop is missing: 'I must look.'" in found


def test_a_template_of_another_family_needs_no_beginning_of_glm() -> None:
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = lines + "{% if add_generation_prompt %}assistant:{% endif %}"
    battery = tuple(c for c in BATTERY if c.name in ("one turn", "five turns", "system first"))
    assert list(find_faults(battery, made_by(template, battery), template)) == []


def test_an_engine_that_makes_another_text_is_told_with_the_difference() -> None:
    ours = MADE["glm-4.6"]
    ask = list_requests(BATTERY)[0]
    theirs = {ask.name: Rendering(str(ours[ask.name].text).replace("Hello", "Hallo"))}
    [fault] = find_disagreements("other", theirs, ours, BATTERY)
    assert (fault.rule, fault.engine, fault.conversation) == ("engines agree", "other", "one turn")
    assert "-Hello, who is there?<|assistant|>\n+Hallo, who is there?<|assistant|>" in fault.diff
    assert list(find_disagreements("other", {ask.name: ours[ask.name]}, ours, BATTERY)) == []


def test_an_engine_that_refuses_or_does_not_is_told() -> None:
    ours = MADE["glm-4.6"]
    wrong = {"one turn, thinking default, prompt 1": Rendering(None, "HTTP 500")}
    wrong |= {"a call, arguments a list, thinking off, prompt 3": Rendering("text")}
    found = [(f.rule, f.detail) for f in find_disagreements("other", wrong, ours, BATTERY)]
    assert found == [
        ("engines agree", "refused: HTTP 500"),
        ("refuses", "expected the error 'Invalid tool call arguments passed', found a text"),
    ]


def test_a_change_that_no_replacement_names_is_told() -> None:
    ours, [ask, *_] = MADE["glm-4.6"], list_requests(BATTERY)
    other = {**ours, ask.name: Rendering("something else")}
    [fault] = find_changes(ours, other, BATTERY, ())
    assert (fault.rule, fault.conversation) == ("as the original", "one turn")
    assert "+something else" in fault.diff
    assert list(find_changes(ours, other, BATTERY, ["one turn"])) == []


def test_a_long_difference_is_cut() -> None:
    shown = format_diff("\n".join(map(str, range(99))), "", "a", "b").splitlines()
    assert len(shown) == 31
    assert shown[-1].endswith("lines more")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (thought("Yes.", " Hm. "), "Hm."),
        (said("<think>\nHm.\n</think>\nYes."), "Hm."),
        (said("Hm.</think>Yes."), "Hm."),
        (said("Yes."), ""),
        (said(None), ""),
        (user("<think>Hm.</think>"), ""),
        (said("<think>no</think>", reasoning_content=""), ""),
    ],
)
def test_reasoning_is_found_where_clients_keep_it(message: Message, expected: str) -> None:
    assert collect_reasoning(message) == expected


@pytest.mark.parametrize("name", sorted(set(COLLECTED.values())))
def test_every_template_that_stands_in_for_a_model_is_in_the_collection(name: str) -> None:
    assert (COLLECTION / name).is_file()


def as_text(family: str) -> str:
    """The whole prompts of a family: what a golden file holds."""
    shown: list[Any] = []
    for ask in list_requests(BATTERY):
        made = MADE[family][ask.name]
        whole = ask.kind == "prompt" and ask.upto == len(ask.conversation.messages)
        if whole and ask.mode != "on" and not (ask.conversation.tools and ask.mode == "off"):
            shown += [f"=== {ask.name}", made.text or f"refused: {made.error}", ""]
    return "\n".join(shown)


GOLDEN = Path(__file__).parents[2] / "golden" / "templates"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_they_were(family: str, pytestconfig: pytest.Config) -> None:
    path = GOLDEN / f"{family}.txt"
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_text(family).encode())
    assert path.exists(), f"{path}: missing; pytest --update-golden writes it"
    assert as_text(family) == path.read_bytes().decode()
