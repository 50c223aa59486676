"""Load a calibration set: conversations as JSON lines, one file a theme, in ``calibration/sets/NAME/``.

The form of a line is described beside the sets. A path to a folder or to one ``.jsonl`` file works like a name.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import InputError, nearest, refuse

SETS = Path(__file__).parent / "sets"
FORM: dict[str, tuple[type, str]] = {
    "id": (str, "text"),
    "language": (str, "text"),
    "thinking": (bool, "true or false"),
    "tools": (list, "a list"),
    "messages": (list, "a list"),
}
"""What a line holds; the id and the messages it must hold."""


@dataclass(frozen=True)
class Document:
    """One conversation."""

    id: str
    language: str
    thinking: bool
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


def load(name: str) -> tuple[Document, ...]:
    """Every document of a set, files and lines in order. Raises InputError that names file, line and field."""
    return tuple(document for path in set_files(name) for document in _read(path))


def set_files(name: str) -> tuple[Path, ...]:
    """The files of a set, by its name or a path. Raises InputError when there are none."""
    known = sorted(p.name for p in SETS.iterdir() if p.is_dir())
    folder = SETS / name if name in known else Path(name)
    paths = (folder,) if folder.is_file() else tuple(sorted(folder.glob("*.jsonl")))
    if not paths:
        raise InputError(f"calibration set {name!r} is not known: {nearest(name, known)}")
    return paths


def _read(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected UTF-8, found something else ({e})") from e
    # Not splitlines(): a JSON string may hold U+2028 and its like, which Python takes for ends of lines too.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        yield _document(line, f"{path}:{number}")


def _document(line: str, where: str) -> Document:
    try:
        data = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where}: expected a JSON object, found something else ({e})") from e
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a JSON object, found {line[:40]}")
    refuse(_problems(data, where))
    return Document(
        data["id"], data.get("language", ""), data.get("thinking", False),
        tuple(data["messages"]), tuple(data.get("tools", ())),
    )  # fmt: skip


def _problems(data: dict[str, Any], where: str) -> Iterator[str]:
    for key in data:
        if key not in FORM:
            yield f"{where}: {key}: unknown key; {nearest(key, FORM)}"
    for key, (kind, words) in FORM.items():
        if key in data and not isinstance(data[key], kind):
            yield f"{where}: {key}: expected {words}, found {data[key]!r}"
    if "id" not in data:
        yield f"{where}: id: missing"
    if not data.get("messages"):
        yield f"{where}: messages: expected at least one, found none"
    elif isinstance(data["messages"], list):
        for n, message in enumerate(data["messages"]):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                yield f"{where}: messages[{n}]: expected an object with a role, found {message!r}"
