"""Read TOML as a frozen dataclass. Unknown keys are errors; all problems are reported at once."""

import dataclasses
import json
import tomllib
import typing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from quant.core.errors import InputError, raise_problems, suggest_name
from quant.core.secrets import LIKE_A_TOKEN, TOKEN

T = TypeVar("T")


class Strict:
    """Base of every dataclass that is read from TOML: unknown keys and NaN are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def read_toml(path: Path, kind: type[T]) -> T:
    """Read a TOML file as a dataclass.

    Raises:
        InputError: The file cannot be read, holds a token, or does not fit; all problems at once.
    """
    try:
        data = tomllib.loads(read_recipe_text(path))
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"{path}: not TOML: {e}") from e
    return parse_json_value(data, kind, str(path))


def parse_json_value(data: Any, kind: type[T], where: str) -> T:
    """Convert plain values (dict, list, str, number) to a dataclass.

    Args:
        data: What a TOML or JSON parser returned.
        kind: The dataclass to make.
        where: What errors call the data, such as a path.

    Raises:
        InputError: The data does not fit; every problem at once.
    """
    try:
        # Through JSON: only there pydantic's strict mode accepts a list for a tuple field.
        adapter = _make_adapter(kind)  # type: ignore[arg-type]  # a class is hashable
        value: T = adapter.validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as e:
        raise InputError(*(f"{where}: {_describe(error, kind)}" for error in e.errors())) from e
    return value


@cache
def _make_adapter(kind: Any) -> "TypeAdapter[Any]":
    # Building one costs more than a hundred uses: 0.3 s for a release's manifest.
    return TypeAdapter(kind)


def read_recipe_text(path: Path) -> str:
    """Read the text of a recipe, which is published with a release.

    Raises:
        InputError: As :func:`read_utf8`, and for a token in the text, which is not quoted.
    """
    text = read_utf8(path)
    raise_problems(
        f"{path}: line {n}: expected no token of the hub, found one; take it out,"
        f" revoke it if anybody has seen this file, and set {TOKEN}"
        for n, line in enumerate(text.splitlines(), 1)
        if LIKE_A_TOKEN.search(line)
    )
    return text


def read_utf8(path: Path) -> str:
    """Read a file's text.

    Raises:
        InputError: The file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected UTF-8, found something else ({e})") from e


def _describe(error: Any, kind: type) -> str:
    """Return one validation error as a line: the field as TOML has it, and the problem."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]]
    field = "".join(parts).lstrip(".")
    # pydantic's name for a key that a dataclass does not have (`extra="forbid"`).
    if error["type"] == "unexpected_keyword_argument":
        keys = _list_keys(kind, error["loc"][:-1])
        return f"{field}: unknown key; {suggest_name(str(error['loc'][-1]), keys)}"
    if error["type"] == "missing":
        return f"{field}: missing; every {kind.__name__} needs it"
    return f"{field}: {error['msg'].removeprefix('Input ')}, found {error['input']!r}"


def _list_keys(kind: Any, loc: tuple[str | int, ...]) -> list[str]:
    """Return the keys that the dataclass at a place may have. Indices of lists are passed over."""
    for part in loc:
        hint = typing.get_type_hints(kind).get(str(part))
        kind = next(
            (a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)), kind
        )
    return [f.name for f in dataclasses.fields(kind)]
