"""Scenarios as data: the shipped sets, and what a person may write in one."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from quant.chat.scenarios import Scenarios, load_scenarios, merge_scenarios
from quant.chat.smoke import collect_waivers
from quant.core.errors import InputError
from quant.core.toml import parse_json_value
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


def test_every_shipped_set_tests_all_that_clients_do() -> None:
    for name in list_recipes("scenarios"):
        scenarios = load_scenarios(name).scenarios
        turns = [t for s in scenarios for t in s.turns]
        assert any(s.stream and s.tools for s in scenarios) and any(
            s.stream and not s.tools for s in scenarios
        )
        assert any(s.parallel for s in scenarios) and any(
            s.schema and not s.thinking for s in scenarios
        )
        assert any(s.stop for s in scenarios) and any(s.fill_tokens >= 2000 for s in scenarios)
        assert any(t.results and t.parts for t in turns) and any(
            t.results and not t.parts for t in turns
        )
        assert all(s.why.endswith(".") for s in scenarios)
    assert any(s.picture for s in load_scenarios("glm").scenarios)


@pytest.mark.parametrize("model", list_recipes("models"))
def test_every_model_runs_its_own_conversation_first_with_reasoning_on_and_off(model: str) -> None:
    recipe, _ = load_model(model)
    on, off, *rest = merge_scenarios(recipe).scenarios
    assert (on.thinking, off.thinking) == (True, False)
    assert [t.say for t in on.turns] == [t.say for t in off.turns] == [t.say for t in recipe.smoke]
    assert len(on.turns) >= 4 and on.turns[-1].expect
    assert rest and not any(s.picture for s in rest)


@pytest.mark.parametrize("name", list_recipes("scenarios"))
def test_a_set_survives_the_json_of_a_manifest(name: str) -> None:
    scenarios = load_scenarios(name)
    assert parse_json_value(json.loads(json.dumps(asdict(scenarios))), Scenarios, "x") == scenarios
    assert (
        merge_scenarios(replace(TINY, scenarios="nowhere"), scenarios=scenarios).tools
        == scenarios.tools
    )


def test_a_scenario_with_an_image_needs_a_vision_projector() -> None:
    glm, _ = load_model("glm-4.6v-flash")
    assert [s.name for s in merge_scenarios(glm, has_vision=True).scenarios if s.picture] == [
        "a picture"
    ]
    assert [s.name for s in merge_scenarios(glm, ["a picture"], has_vision=True).scenarios] == [
        "a picture"
    ]
    with pytest.raises(
        InputError, match="'a picture': it sends an image; name the vision projector with --mmproj"
    ):
        merge_scenarios(glm, ["a picture"])


def test_scenarios_can_be_selected_and_an_unknown_name_gets_a_suggestion() -> None:
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


def test_a_waiver_must_name_something_that_can_fail() -> None:
    model = replace(TINY, waivers=(Waiver("stream", "the stream is slow"),))
    assert collect_waivers(
        model.waivers, merge_scenarios(model), ["answers", "special tokens"]
    ) == {
        "stream": "the stream is slow",
        "answers": "waived for this run",
        "special tokens": "waived for this run",
    }
    assert collect_waivers((), merge_scenarios(TINY), ["an empty answer"]) == {
        "an empty answer": "waived for this run"
    }  # a test conversation
    with pytest.raises(
        InputError, match=r"waiver 'streams': no scenario of that name: did you mean 'stream'\?"
    ):
        collect_waivers((), merge_scenarios(TINY), ["streams"])


@pytest.mark.parametrize(
    ("find", "put", "message"),
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
        (
            'why = "Because."',
            'why = "Because."\nschema = { type = "objct" }',
            "scenarios[0].schema.type: expected a JSON schema, found 'objct'",
        ),
        (
            'parameters = { type = "object" }',
            'parameters = { properties = { a = { "$ref" = "#/$defs/b" } } }',
            "tools[0].parameters: expected references within the schema, found '#/$defs/b'",
        ),
    ],
)
def test_every_problem_of_a_set_is_reported_with_its_place(
    find: str, put: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.toml"
    path.write_text(WHOLE)
    assert load_scenarios(str(path)).declare_tools(["add"])[0]["function"]["name"] == "add"
    assert find in WHOLE
    path.write_text(WHOLE.replace(find, put))
    with pytest.raises(InputError) as caught:
        load_scenarios(str(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(WHOLE + WHOLE[WHOLE.index("[[scenarios]]") :])
    with pytest.raises(InputError, match="'one': expected once, found twice"):
        load_scenarios(str(path))
