"""Modelfiles: what ``ollama create`` reads beside a GGUF. Pure.

Ollama knows no escapes: a value stands in one or three double quotes, and ends at the first end of a line at which they
are closed. So there are texts that cannot be written, and those are refused instead of being cut.
"""

from collections.abc import Mapping
from typing import Any

from quant.errors import InputError

TRIPLE = '"""'


def format_modelfile(file: str, params: Mapping[str, Any], system: str | None = None) -> str:
    """A Modelfile for one unsplit file, with its parameters. Raises InputError for a text that no Modelfile can hold."""
    lines = [f"FROM {_value(f'./{file}', 'the name of the file')}"]
    for key, value in params.items():
        several = value if isinstance(value, list | tuple) else [value]
        lines += [
            f"PARAMETER {key} {_value(one, key) if isinstance(one, str) else _number(one)}"
            for one in several
        ]
    if system:
        lines.append(f"SYSTEM {_value(system, 'system', long=True)}")
    return "\n".join(lines) + "\n"


def _value(text: str, what: str, long: bool = False) -> str:
    """A text in quotes; the name of a file stands as it is, where nothing in it could be taken for quotes or blanks."""
    if (
        what == "the name of the file"
        and '"' not in text
        and text == text.strip()
        and "\n" not in text
    ):
        return text
    for marks in (TRIPLE,) if long else ('"', TRIPLE):
        if parse_modelfile(written := f"{marks}{text}{marks}") == text:
            return written
    raise InputError(
        f"{what}: expected a text that a Modelfile can hold, found {text[:80]!r}, whose quotes would end it"
    )


def parse_modelfile(written: str) -> str | None:
    """The value that Ollama reads where a text begins: up to the first end of a line at which its quotes are closed."""
    lines = written.split("\n")
    for n in range(1, len(lines) + 1):
        value = _unquoted("\n".join(lines[:n]).strip())
        if value is not None:
            return value if n == len(lines) else None
    return None


def _unquoted(text: str) -> str | None:
    for marks in (TRIPLE, '"'):
        if text.startswith(marks):
            closed = len(text) >= 2 * len(marks) and text.endswith(marks)
            return text[len(marks) : -len(marks)] if closed else None
    return text


def _number(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
