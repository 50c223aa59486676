"""What other people's scripts and recipes depend on: commands, options, keys of ``--json``, keys of recipes.

``compatibility.json`` lists what version 0.1.0 had. A name may be added; none may go. A renamed one stays as an alias.
"""

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from quant import cli
from quant.calibration.sets import CalibrationSet
from quant.chat.scenarios import Scenarios
from quant.cli.options import quant
from quant.plan.recipe import ModelRecipe, TemplatePatch, Variant

GOLDEN = json.loads((Path(__file__).parent / "compatibility.json").read_text())
COMMANDS: dict[str, list[str]] = GOLDEN["commands"]
KEYS: dict[str, list[str]] = GOLDEN["json_keys"]
RECIPES = {
    "models": ModelRecipe,
    "variants": Variant,
    "templates": TemplatePatch,
    "scenarios": Scenarios,
    "calibration sets": CalibrationSet,
}
RENAMED = {"source.licence": "source.license"}
"""Keys that are documented by another name now; tests of their packages read files with the old name."""


def find_command(path: str) -> click.Command:
    command: click.Command = quant
    for name in path.split()[1:]:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


def describe(parameter: click.Parameter) -> set[str]:
    """What a script sees of a parameter, beside its names."""
    words = {
        "required": parameter.required,
        "multiple": parameter.multiple or parameter.nargs != 1,
        "flag": bool(getattr(parameter, "is_flag", False)),
    }
    about = {word for word, holds in words.items() if holds}
    if parameter.envvar:
        about.add(f"env {parameter.envvar}")
    return about


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_takes_what_it_took(path: str) -> None:
    parameters = find_command(path).params
    options = {
        n: p for p in parameters for n in (*p.opts, *p.secondary_opts, *getattr(p, "aliases", ()))
    }
    arguments = [p for p in parameters if isinstance(p, click.Argument)]
    positional = [row for row in COMMANDS[path] if not row.startswith("-")]
    assert [describe(p) for p in arguments] == [set(row.split(", ")[1:]) for row in positional]
    for row in COMMANDS[path]:
        names, *about = row.split(", ")
        for name in names.split():
            if name.startswith("-"):
                assert name in options, f"{path}: {name} is gone"
                expected = {word for word in about if not word.startswith("default ")}
                assert describe(options[name]) == expected, f"{path}: {name}"
        defaults = [word.removeprefix("default ") for word in about if word.startswith("default ")]
        if defaults and names.startswith("-"):
            assert [repr(options[names.split()[0]].default)] == defaults, f"{path}: {names}"


def recipe_keys(cls: type, path: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield f"{path}{field.name}"
        for nested in dataclasses_in(hints[field.name]):
            yield from recipe_keys(nested, f"{path}{field.name}.")


def dataclasses_in(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [found for argument in typing.get_args(hint) for found in dataclasses_in(argument)]


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_may_say_what_it_could_say(kind: str) -> None:
    known = {*recipe_keys(RECIPES[kind])}
    expected = GOLDEN["recipe_keys"][kind]
    assert not [key for key in expected if key not in known and RENAMED.get(key) not in known]


def key_paths(value: Any, path: str = "") -> Iterator[str]:
    """``files[].bytes`` for each key of a document."""
    if isinstance(value, dict):
        for key, nested in value.items():
            yield f"{path}.{key}".lstrip(".")
            yield from key_paths(nested, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for nested in value:
            yield from key_paths(nested, f"{path}[]")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of two variants of the tiny model."""
    folder = tmp_path_factory.mktemp("compatibility")
    assert run("demo", "-o", folder, "-v", "BF16", "-v", "UD-TQ1_0") == 0
    return folder / "tiny-glm"


def run(*arguments: str | Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quant", *map(str, arguments)])
        try:
            return cli._run()
        except SystemExit as e:
            return int(e.code or 0)


@pytest.mark.tools
@pytest.mark.parametrize("command", KEYS)
def test_a_document_has_the_keys_that_it_had(
    command: str, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smallest = release / "tiny-glm-UD-TQ1_0.gguf"
    first = next(release.glob("BF16/*-00001-of-*.gguf"))
    arguments: dict[str, tuple[str | Path, ...]] = {
        "quant allocate": ("glm-4.6", "--size", "135GB", "-o", tmp_path / "variant.toml"),
        "quant calibration show": ("embedded",),
        "quant evaluate": (first, smallest),
        "quant imatrix show": (release / "imatrix_tiny-glm.gguf",),
        "quant inspect": (smallest,),
        "quant ollama check": (release,),
        "quant plan": ("tiny-glm",),
        "quant smoke": (smallest,),
        "quant template check": ("tiny-glm",),
    }
    capsys.readouterr()
    assert run(*command.split()[1:], *arguments[command], "--json") == 0
    document = json.loads(capsys.readouterr().out)
    actual = {*key_paths(document)}
    for key in KEYS[command]:
        parent, star, rest = key.partition(".*.")
        if not star:
            assert key in actual, key
        else:
            assert any(a.startswith(f"{parent}.") and a.endswith(f".{rest}") for a in actual), key
