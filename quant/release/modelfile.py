"""Modelfiles, which ``ollama create`` reads beside a GGUF. Pure.

Ollama's parser (parser/parser.go) knows no escapes: a value stands in one or three double quotes
and ends at the first line end where they are closed. Some texts can therefore not be written. Those
are refused, not cut. That is also why this is no Jinja template: the format is a line a value, and
all the work is in the quoting.
"""

from collections.abc import Mapping
from typing import Any

from quant.core.errors import InputError

TRIPLE = '"""'
QUOTES = ('"', TRIPLE)


def format_modelfile(file: str, params: Mapping[str, Any], system: str | None = None) -> str:
    """Return a Modelfile for one unsplit GGUF.

    Args:
        file: The name of the GGUF, in the folder of the Modelfile.
        params: Ollama's parameters; a list becomes a line for each of its values.
        system: The system prompt.

    Raises:
        InputError: For a text that no Modelfile can hold.
    """
    lines = [f"FROM {_format_path(f'./{file}')}"]
    for key, value in params.items():
        lines += [
            f"PARAMETER {key} {_quote(v, key, QUOTES) if isinstance(v, str) else _number(v)}"
            for v in (value if isinstance(value, list | tuple) else [value])
        ]
    if system:
        lines.append(f"SYSTEM {_quote(system, 'system', (TRIPLE,))}")
    return "\n".join(lines) + "\n"


def parse_modelfile(text: str) -> str | None:
    """Return the value that Ollama reads at the start of a text, or None if more follows.

    The value ends at the first line end where its quotes are closed.
    """
    lines = text.split("\n")
    for n in range(1, len(lines) + 1):
        value = _strip_quotes("\n".join(lines[:n]).strip())
        if value is not None:
            return value if n == len(lines) else None
    return None


def _format_path(path: str) -> str:
    """A path needs no quotes unless something in it would be read as quotes or blanks."""
    plain = '"' not in path and "\n" not in path and path == path.strip()
    return path if plain else _quote(path, "the name of the file", QUOTES)


def _quote(text: str, name: str, quotes: tuple[str, ...]) -> str:
    """Return the text in the first quotes that Ollama reads back as it is."""
    # Read back and compared, which is simpler than rules for the texts that can be written.
    for marks in quotes:
        if parse_modelfile(quoted := f"{marks}{text}{marks}") == text:
            return quoted
    raise InputError(
        f"{name}: expected a text that a Modelfile can hold, found {text[:80]!r}, whose quotes"
        " would end it"
    )


def _strip_quotes(text: str) -> str | None:
    """Return the text without its quotes; None if they are open."""
    for marks in (TRIPLE, '"'):
        if text.startswith(marks):
            closed = len(text) >= 2 * len(marks) and text.endswith(marks)
            return text[len(marks) : -len(marks)] if closed else None
    return text


def _number(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
