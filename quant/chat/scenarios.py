"""What the smoke test tries, as data: recipes/scenarios/NAME.toml, a set of scenarios for a family of models.

A scenario says what the user does and, where the model must know something, what a right answer holds. What a client
must be able to rely on whatever the model knows is not said there: it is the same for all (:mod:`quant.chat.runner`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quant.core.toml import Strict, read_toml
from quant.errors import InputError, raise_problems, suggest_name
from quant.plan.load import find_pattern_problems, find_recipe_path
from quant.plan.recipe import ModelRecipe


@dataclass(frozen=True)
class Tool(Strict):
    """A tool as it is declared to the model."""

    name: str
    description: str
    parameters: dict[str, Any]
    """Its JSON schema."""

    @property
    def declared(self) -> dict[str, Any]:
        """As OpenAI's interface takes it."""
        about = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": about}


@dataclass(frozen=True)
class Call(Strict):
    """A call that a right answer makes."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Step(Strict):
    """One thing that the user says, and what comes of it."""

    say: str
    expect: str | None = None
    """A regular expression that a right answer holds, upper and lower case alike; none: nothing is known of it."""
    calls: tuple[Call, ...] = ()
    """What a right answer calls first."""
    results: tuple[str, ...] = ()
    """What the tools return, call by call."""
    parts: bool = False
    """The results come as typed parts instead of text."""
    fill: bool = False
    """So many turns of small talk stand before it that the prompt has the scenario's ``fill_tokens``."""


@dataclass(frozen=True)
class Scenario(Strict):
    """One conversation, and how it is held."""

    name: str
    turns: tuple[Step, ...]
    why: str
    thinking: bool = False
    tools: tuple[str, ...] = ()
    """Names of the set's tools that are declared."""
    parallel: bool = False
    """Several calls at once are allowed."""
    stream: bool = False
    """Every answer is asked for twice, whole and as a stream, and the two are compared."""
    schema: dict[str, Any] | None = None
    """JSON schema that the answers must have."""
    stop: str | None = None
    """A text at which the answer must stop."""
    fill_tokens: int = 0
    beyond: bool = False
    """Beyond the model: it must be served, and what it says is not looked at, because nonsense may hold anything."""
    picture: bool = False
    """A picture goes with the first question; only tried where the model sees."""


@dataclass(frozen=True)
class ControlTokens(Strict):
    """The control tokens of a family."""

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

    def declared(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The tools of these names."""
        return [t.declared for t in self.tools if t.name in names]


def load_scenarios(name: str) -> Scenarios:
    """A set by its name in recipes/scenarios or by a path. Raises InputError with everything that is wrong in it."""
    path = find_recipe_path("scenarios", name)
    found = read_toml(path, Scenarios)
    raise_problems(f"{path}: {problem}" for problem in _problems(found))
    return found


def merge_scenarios(
    model: ModelRecipe,
    only: Sequence[str] = (),
    *,
    sees: bool = False,
    found: Scenarios | None = None,
) -> Scenarios:
    """Everything that is tried with a model: its own conversation, thinking on and off, then its set's scenarios.

    ``only`` names those that are wanted, ``found`` is the set, if it is not to be looked for by its name. Raises InputError
    for a name that is none.
    """
    found = found or load_scenarios(model.scenarios)
    steps = tuple(Step(turn.say, turn.expect) for turn in model.smoke)
    own = tuple(
        Scenario(
            f"conversation, thinking {mode}",
            steps,
            "The bug that this project began with came at the second turn.",
            thinking=mode == "on",
        )
        for mode in ("on", "off")
    )
    every = (*own, *found.scenarios)
    names = [s.name for s in every]
    raise_problems(
        f"scenario {n!r} is not known: {suggest_name(n, names)}" for n in only if n not in names
    )
    chosen = tuple(s for s in every if (not only or s.name in only) and (sees or not s.picture))
    if not chosen:
        raise InputError(
            f"scenario {only[0]!r}: it shows a picture; name the part that sees with --mmproj"
        )
    return Scenarios(found.name, found.summary, chosen, found.tokens, found.tools)


def _problems(found: Scenarios) -> Iterator[str]:
    tools, names = [t.name for t in found.tools], [s.name for s in found.scenarios]
    yield from (
        f"scenarios: {n!r}: expected once, found twice"
        for n in sorted({n for n in names if names.count(n) > 1})
    )
    for n, scenario in enumerate(found.scenarios):
        where = f"scenarios[{n}]"
        if not scenario.turns:
            yield f"{where}.turns: expected at least one, found none"
        yield from (
            f"{where}.tools: {t!r} is not known: {suggest_name(t, tools)}"
            for t in scenario.tools
            if t not in tools
        )
        if scenario.schema is not None and scenario.thinking:
            yield f"{where}.schema: expected thinking off, because a schema begins with the first word, found it on"
        if any(t.fill for t in scenario.turns) != (scenario.fill_tokens > 0):
            yield f"{where}.fill_tokens: expected a number and a turn with `fill`, found one without the other"
        for m, step in enumerate(scenario.turns):
            yield from _step_problems(step, scenario, f"{where}.turns[{m}]")


def _step_problems(step: Step, scenario: Scenario, where: str) -> Iterator[str]:
    if step.expect is not None:
        yield from find_pattern_problems(step.expect, f"{where}.expect")
    if len(step.results) != len(step.calls):
        yield f"{where}.results: expected one for each of {len(step.calls)} calls, found {len(step.results)}"
    for call in step.calls:
        if call.name not in scenario.tools:
            yield f"{where}.calls: {call.name!r} is not declared: {suggest_name(call.name, scenario.tools)}"


def find_schema_faults(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """Where a JSON value is not what a schema says; as much of JSON Schema as tools are declared with."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    kind = schema.get("type")
    fits = kind not in kinds or (
        isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))
    )
    if not fits:
        yield f"{where}: expected {kind}, found {value!r}"
    elif isinstance(value, dict):
        properties = schema.get("properties", {})
        yield from (
            f"{where}: {key}: missing" for key in schema.get("required", ()) if key not in value
        )
        if schema.get("additionalProperties") is False:
            yield from (
                f"{where}: {key}: not in the schema" for key in value if key not in properties
            )
        for key, inner in properties.items():
            if key in value:
                yield from find_schema_faults(value[key], inner, f"{where}.{key}")
