"""What a smoke test asks, as data: a set of scenarios in recipes/scenarios/NAME.toml.

A scenario says what the user writes and, where the model must know something, what a correct answer
contains. What a client must be able to rely on whatever the model knows is not part of a scenario:
it is the same for all of them (:mod:`quant.chat.runner`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quant.chat.schema import find_schema_problems
from quant.core.errors import InputError, raise_problems, suggest_name
from quant.core.toml import Strict, read_toml
from quant.plan.load import find_pattern_problems, find_recipe_path
from quant.plan.recipe import ModelRecipe


@dataclass(frozen=True)
class Tool(Strict):
    """A tool that is declared to the model."""

    name: str
    description: str
    parameters: dict[str, Any]
    """Its JSON schema."""

    @property
    def declaration(self) -> dict[str, Any]:
        """The tool as OpenAI's API takes it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call(Strict):
    """A call that a correct answer makes."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Step(Strict):
    """One message of the user, and what a correct answer to it is."""

    say: str
    expect: str | None = None
    """A regular expression that a correct answer matches, in any case; None judges no answer."""
    calls: tuple[Call, ...] = ()
    """Calls that a correct answer makes first."""
    results: tuple[str, ...] = ()
    """Results of the tools, one for each call."""
    parts: bool = False
    """The results are sent as typed parts instead of text."""
    fill: bool = False
    """Turns of small talk are put before it until the prompt has the scenario's ``fill_tokens``."""


@dataclass(frozen=True)
class Scenario(Strict):
    """One conversation, and the settings that it is run with."""

    name: str
    turns: tuple[Step, ...]
    why: str
    thinking: bool = False
    tools: tuple[str, ...] = ()
    """Names of the set's tools that are declared."""
    parallel: bool = False
    """Several calls at once are allowed."""
    stream: bool = False
    """Every answer is requested twice, whole and as a stream, and the two are compared."""
    schema: dict[str, Any] | None = None
    """JSON schema that the answers must match."""
    stop: str | None = None
    """Stop sequence of the answers."""
    fill_tokens: int = 0
    beyond: bool = False
    """Beyond the model: requests must succeed, but answers may be nonsense."""
    picture: bool = False
    """An image is sent with the first message; needs a vision projector."""


@dataclass(frozen=True)
class ControlTokens(Strict):
    """Control tokens that the files are tested for."""

    single: tuple[str, ...] = ()
    """Each must be one token of the vocabulary."""
    call: tuple[str, ...] = ()
    """A tool call in a prompt must be written with these."""


@dataclass(frozen=True)
class Scenarios(Strict):
    """recipes/scenarios/NAME.toml."""

    name: str
    summary: str
    scenarios: tuple[Scenario, ...]
    tokens: ControlTokens = field(default_factory=ControlTokens)
    tools: tuple[Tool, ...] = ()

    def declare_tools(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the declarations of the tools with these names."""
        return [t.declaration for t in self.tools if t.name in names]


def load_scenarios(name: str) -> Scenarios:
    """Return a set of scenarios.

    Args:
        name: A name in recipes/scenarios, or a path.

    Raises:
        InputError: With every problem of the file.
    """
    path = find_recipe_path("scenarios", name)
    scenarios = read_toml(path, Scenarios)
    raise_problems(f"{path}: {problem}" for problem in _find_problems(scenarios))
    return scenarios


def merge_scenarios(
    model: ModelRecipe,
    only: Sequence[str] = (),
    *,
    has_vision: bool = False,
    scenarios: Scenarios | None = None,
) -> Scenarios:
    """Return all scenarios of a model: its own conversation, reasoning on and off, then its set's.

    Args:
        model: The model recipe.
        only: Names of the scenarios to run; empty runs all.
        has_vision: A vision projector is loaded, so scenarios with an image are run too.
        scenarios: The set; None loads the recipe's.

    Raises:
        InputError: A name of ``only`` is unknown, or nothing is left to run.
    """
    scenarios = scenarios or load_scenarios(model.scenarios)
    steps = tuple(Step(turn.say, turn.expect) for turn in model.smoke)
    # The first GGUFs of GLM-4.6 answered well once and broke at the second turn.
    own = tuple(
        Scenario(
            name=f"conversation, thinking {mode}",
            turns=steps,
            why="The bug that this project began with came at the second turn.",
            thinking=mode == "on",
        )
        for mode in ("on", "off")
    )
    merged = replace(scenarios, scenarios=(*own, *scenarios.scenarios))
    return select_scenarios(merged, only, has_vision=has_vision)


def select_scenarios(
    scenarios: Scenarios, only: Sequence[str] = (), *, has_vision: bool = False
) -> Scenarios:
    """Return the scenarios to run. Args and errors are those of :func:`merge_scenarios`."""
    names = [s.name for s in scenarios.scenarios]
    raise_problems(
        f"scenario {n!r} is not known: {suggest_name(n, names)}" for n in only if n not in names
    )
    selected = tuple(
        s
        for s in scenarios.scenarios
        if (not only or s.name in only) and (has_vision or not s.picture)
    )
    if not selected:
        raise InputError(
            f"scenario {only[0]!r}: it sends an image; name the vision projector with --mmproj"
        )
    return replace(scenarios, scenarios=selected)


def _find_problems(scenarios: Scenarios) -> Iterator[str]:
    tools, names = [t.name for t in scenarios.tools], [s.name for s in scenarios.scenarios]
    yield from (
        f"scenarios: {n!r}: expected once, found twice"
        for n in sorted({n for n in names if names.count(n) > 1})
    )
    for n, tool in enumerate(scenarios.tools):
        yield from find_schema_problems(tool.parameters, f"tools[{n}].parameters")
    for n, scenario in enumerate(scenarios.scenarios):
        yield from _find_scenario_problems(scenario, tools, f"scenarios[{n}]")


def _find_scenario_problems(scenario: Scenario, tools: Sequence[str], where: str) -> Iterator[str]:
    if not scenario.turns:
        yield f"{where}.turns: expected at least one, found none"
    yield from (
        f"{where}.tools: {t!r} is not known: {suggest_name(t, tools)}"
        for t in scenario.tools
        if t not in tools
    )
    if scenario.schema is not None:
        yield from find_schema_problems(scenario.schema, f"{where}.schema")
        if scenario.thinking:
            # llama-server's grammar applies from the first token, reasoning included.
            yield (
                f"{where}.schema: expected thinking off, because a schema applies from the first"
                " token, found it on"
            )
    if any(t.fill for t in scenario.turns) != (scenario.fill_tokens > 0):
        yield (
            f"{where}.fill_tokens: expected a number and a turn with `fill`, found one without"
            " the other"
        )
    for n, step in enumerate(scenario.turns):
        yield from _find_step_problems(step, scenario, f"{where}.turns[{n}]")


def _find_step_problems(step: Step, scenario: Scenario, where: str) -> Iterator[str]:
    if step.expect is not None:
        yield from find_pattern_problems(step.expect, f"{where}.expect")
    if len(step.results) != len(step.calls):
        yield (
            f"{where}.results: expected one for each of {len(step.calls)} calls,"
            f" found {len(step.results)}"
        )
    for call in step.calls:
        if call.name not in scenario.tools:
            suggestion = suggest_name(call.name, scenario.tools)
            yield f"{where}.calls: {call.name!r} is not declared: {suggestion}"
