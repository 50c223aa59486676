"""Load a calibration set: conversations as JSON lines, one file a theme, in ``calibration/sets/NAME/``.

The form of a line is described beside the sets. A path to a folder or to one ``.jsonl`` file works like a name.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import InputError, nearest

SETS = Path(__file__).parent / "sets"
KEYS = {"id", "language", "thinking", "tools", "messages"}


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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            data = json.loads(line)
        except ValueError as e:
            raise InputError(f"{path}:{number}: expected a JSON object, found something else ({e})") from e
        if unknown := sorted(set(data) - KEYS):
            raise InputError(f"{path}:{number}: {unknown[0]}: unknown key; {nearest(unknown[0], KEYS)}")
        if not data.get("messages"):
            raise InputError(f"{path}:{number}: messages: expected at least one, found none")
        yield Document(
            str(data["id"]), str(data.get("language", "")), bool(data.get("thinking")),
            tuple(data["messages"]), tuple(data.get("tools", ())),
        )  # fmt: skip
