"""Read TOML as a frozen dataclass: what the class does not know is refused, and all problems are told at once."""

import dataclasses
import json
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from quant.core.secrets import LIKE_A_TOKEN, TOKEN
from quant.errors import InputError, raise_problems, suggest_name

T = TypeVar("T")


class Strict:
    """What is written in TOML inherits this: an unknown key is an error."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def read_toml(path: Path, noun: type[T]) -> T:
    """The file as the noun that it describes. Raises InputError with every problem in it."""
    try:
        data = tomllib.loads(read_recipe_text(path))
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"{path}: not TOML: {e}") from e
    return parse_json_value(data, noun, str(path))


def parse_json_value(data: Any, noun: type[T], where: str) -> T:
    """Plain values as the noun that they describe; ``where`` names them in errors. Raises InputError with every problem."""
    try:
        # Through JSON, because only there strict types and tuples go together.
        return TypeAdapter(noun).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as e:
        raise InputError(*(f"{where}: {_say(error, noun)}" for error in e.errors())) from e


def read_recipe_text(path: Path) -> str:
    """The text of what a person wrote. Raises InputError as :func:`text_of`, and for a token in it, without telling it."""
    text = read_utf8(path)
    raise_problems(
        f"{path}: line {n}: expected no token of the hub, found one; take it out, revoke it if anybody has seen this file,"
        f" and set {TOKEN}"
        for n, line in enumerate(text.splitlines(), 1)
        if LIKE_A_TOKEN.search(line)
    )
    return text


def read_utf8(path: Path) -> str:
    """A file's text. Raises InputError when it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected UTF-8, found something else ({e})") from e


def _say(error: Any, noun: type) -> str:
    """One problem of a recipe: the field as a person writes it, and what is wrong there."""
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]
    ).lstrip(".")
    if error["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key; {suggest_name(str(error['loc'][-1]), _keys(noun, error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{where}: missing; every {noun.__name__} recipe says it"
    return f"{where}: {error['msg'].removeprefix('Input ')}, found {error['input']!r}"


def _keys(noun: Any, loc: tuple[str | int, ...]) -> list[str]:
    """The keys that a recipe may have at a place."""
    for part in loc:
        hint = typing.get_type_hints(noun).get(str(part))
        noun = next(
            (a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)), noun
        )
    return [f.name for f in dataclasses.fields(noun)]
