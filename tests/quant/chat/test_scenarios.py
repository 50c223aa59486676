"""Scenarios as data: what the project ships, what a person may write, and what a value must be to fit a schema."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from quant.chat.scenarios import Scenarios, find_schema_faults, load_scenarios, merge_scenarios
from quant.chat.smoke import collect_waivers
from quant.core.toml import parse_json_value
from quant.errors import InputError
from quant.plan.load import list_recipes, load_model
from quant.plan.recipe import Waiver

TINY, _ = load_model("tiny-glm")
WHOLE = """
name = "s"
summary = "For tests."
[[tools]]
name = "add"
description = "Adds."
parameters = { type = "object" }
[[scenarios]]
name = "one"
why = "Because."
tools = ["add"]
[[scenarios.turns]]
say = "Hello."
expect = "Hi"
"""


def test_what_a_client_does_is_all_tried_with_every_model() -> None:
    for name in list_recipes("scenarios"):
        tried = load_scenarios(name).scenarios
        turns = [t for s in tried for t in s.turns]
        assert any(s.stream and s.tools for s in tried) and any(
            s.stream and not s.tools for s in tried
        )
        assert any(s.parallel for s in tried) and any(s.schema and not s.thinking for s in tried)
        assert any(s.stop for s in tried) and any(s.fill_tokens >= 2000 for s in tried)
        assert any(t.results and t.parts for t in turns) and any(
            t.results and not t.parts for t in turns
        )
        assert all(s.why.endswith(".") for s in tried)
    assert any(s.picture for s in load_scenarios("glm").scenarios)


@pytest.mark.parametrize("model", list_recipes("models"))
def test_every_model_holds_its_own_conversation_first_thinking_on_and_off(model: str) -> None:
    recipe, _ = load_model(model)
    on, off, *rest = merge_scenarios(recipe).scenarios
    assert (on.thinking, off.thinking) == (True, False)
    assert [t.say for t in on.turns] == [t.say for t in off.turns] == [t.say for t in recipe.smoke]
    assert len(on.turns) >= 4 and on.turns[-1].expect
    assert rest and not any(s.picture for s in rest)


@pytest.mark.parametrize("name", list_recipes("scenarios"))
def test_a_set_is_the_same_after_json_as_a_manifest_holds_it(name: str) -> None:
    found = load_scenarios(name)
    assert parse_json_value(json.loads(json.dumps(asdict(found))), Scenarios, "x") == found
    assert merge_scenarios(replace(TINY, scenarios="nowhere"), found=found).tools == found.tools


def test_a_picture_is_shown_to_who_sees() -> None:
    glm, _ = load_model("glm-4.6v-flash")
    assert [s.name for s in merge_scenarios(glm, sees=True).scenarios if s.picture] == ["a picture"]
    assert [s.name for s in merge_scenarios(glm, ["a picture"], sees=True).scenarios] == [
        "a picture"
    ]
    with pytest.raises(
        InputError, match="'a picture': it shows a picture; name the part that sees with --mmproj"
    ):
        merge_scenarios(glm, ["a picture"])


def test_some_can_be_chosen_and_a_wrong_name_is_told_with_its_neighbour() -> None:
    assert [s.name for s in merge_scenarios(TINY, ["stream", "stop"]).scenarios] == [
        "stream",
        "stop",
    ]
    with pytest.raises(InputError) as caught:
        merge_scenarios(TINY, ["streem", "stopp"])
    assert caught.value.problems == (
        "scenario 'streem' is not known: did you mean 'stream'?",
        "scenario 'stopp' is not known: did you mean 'stop'?",
    )


def test_a_waiver_names_what_can_fail_and_gives_its_reason() -> None:
    model = replace(TINY, waivers=(Waiver("stream", "the stream is slow"),))
    assert collect_waivers(model, merge_scenarios(model), ["answers", "special tokens"]) == {
        "stream": "the stream is slow",
        "answers": "waived for this run",
        "special tokens": "waived for this run",
    }
    assert collect_waivers(TINY, merge_scenarios(TINY), ["an empty answer"]) == {
        "an empty answer": "waived for this run"
    }  # the battery's
    with pytest.raises(
        InputError, match=r"waiver 'streams': no scenario of that name: did you mean 'stream'\?"
    ):
        collect_waivers(TINY, merge_scenarios(TINY), ["streams"])


@pytest.mark.parametrize(
    ("find", "put", "said"),
    [
        (
            'tools = ["add"]',
            'tools = ["ad"]',
            "scenarios[0].tools: 'ad' is not known: did you mean 'add'?",
        ),
        (
            'expect = "Hi"',
            'expect = "("',
            "scenarios[0].turns[0].expect: expected a regular expression, found '('",
        ),
        (
            'expect = "Hi"',
            'calls = [{ name = "add", arguments = {} }]',
            "results: expected one for each of 1 calls, found 0",
        ),
        (
            'expect = "Hi"',
            'calls = [{ name = "sub", arguments = {} }]\nresults = ["1"]',
            "calls: 'sub' is not declared",
        ),
        ('expect = "Hi"', "fill = true", "fill_tokens: expected a number and a turn with `fill`"),
        (
            'why = "Because."',
            'why = "Because."\nfill_tokens = 9',
            "fill_tokens: expected a number and a turn with `fill`",
        ),
        (
            'why = "Because."',
            'why = "Because."\nthinking = true\nschema = {}',
            "schema: expected thinking off",
        ),
        (
            'why = "Because."',
            'why = "Because."\nthink = true',
            "scenarios[0].think: unknown key; did you mean 'thinking'?",
        ),
        (
            '[[scenarios.turns]]\nsay = "Hello."\nexpect = "Hi"',
            "turns = []",
            "turns: expected at least one, found none",
        ),
    ],
)
def test_what_is_wrong_in_a_set_is_told_where_it_stands(
    find: str, put: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.toml"
    path.write_text(WHOLE)
    assert load_scenarios(str(path)).declared(["add"])[0]["function"]["name"] == "add"
    assert find in WHOLE
    path.write_text(WHOLE.replace(find, put))
    with pytest.raises(InputError) as caught:
        load_scenarios(str(path))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_name_that_stands_twice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(WHOLE + WHOLE[WHOLE.index("[[scenarios]]") :])
    with pytest.raises(InputError, match="'one': expected once, found twice"):
        load_scenarios(str(path))


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "string"},
        "c": {"type": "object", "required": ["d"]},
    },
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": 1}, []),
        ({"a": 1, "b": "x", "c": {"d": None}}, []),
        ([], ["v: expected object, found []"]),
        ({"a": "1"}, ["v.a: expected integer, found '1'"]),
        ({"a": True}, ["v.a: expected integer, found True"]),
        ({"a": 1.0}, ["v.a: expected integer, found 1.0"]),
        (
            {"b": 2, "z": 1},
            ["v: a: missing", "v: z: not in the schema", "v.b: expected string, found 2"],
        ),
        ({"a": 1, "c": {}}, ["v.c: d: missing"]),
    ],
)
def test_a_value_that_does_not_fit_is_told_where(value: Any, said: list[str]) -> None:
    assert list(find_schema_faults(value, SCHEMA, "v")) == said
