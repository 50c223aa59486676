"""Documents: what a model reads while its activations are measured, and the JSON lines that hold them.

The form of a line is described beside the embedded set. A document is a conversation, or plain text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.core.data import data_folder
from quant.errors import InputError, raise_problems, suggest_name

SETS = data_folder("calibration/sets")
FORM: dict[str, tuple[type, str]] = {
    "id": (str, "text"),
    "language": (str, "text"),
    "thinking": (bool, "true or false"),
    "tools": (list, "a list"),
    "messages": (list, "a list"),
    "text": (str, "text"),
}
"""What a line holds: the id, and messages or a text, it must hold."""
MAY_FOLLOW = {  # after a role (None: the start), these may come
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "calls": {"tool"},
    "tool": {"tool", "assistant"},
}


@dataclass(frozen=True)
class Document:
    """One conversation, or one text."""

    id: str
    language: str
    thinking: bool
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    """Instead of messages: read as it stands."""
    source: str = ""
    kind: str = ""

    def words(self) -> str:
        """All that is said in it, without declarations of tools and their arguments."""
        parts = (m.get(key) for m in self.messages for key in ("content", "reasoning_content"))
        return "\n".join([self.text or "", *(str(p) for p in parts if p)])

    def json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return asdict(self)


def load_documents(name: str) -> tuple[Document, ...]:
    """Every document of a folder of JSON lines, files and lines in order. Raises InputError with file, line and field."""
    return tuple(document for path in set_files(name) for document in read_lines(path))


def set_files(name: str) -> tuple[Path, ...]:
    """The files of a folder, by its name or a path. Raises InputError when there are none."""
    known = sorted(p.name for p in SETS.iterdir() if p.is_dir())
    folder = SETS / name if name in known else Path(name)
    paths = (folder,) if folder.is_file() else tuple(sorted(folder.glob("*.jsonl")))
    if not paths:
        raise InputError(f"calibration set {name!r} is not known: {suggest_name(name, known)}")
    return paths


def read_lines(path: Path) -> Iterator[Document]:
    """The documents of one file of JSON lines. Raises InputError with every problem of the first line that is broken."""
    for number, data in json_lines(path):
        where = f"{path}:{number}"
        raise_problems(_problems(data, where))
        yield Document(
            data["id"],
            data.get("language", ""),
            data.get("thinking", False),
            tuple(data.get("messages", ())),
            tuple(data.get("tools", ())),
            data.get("text"),
        )


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their numbers. Raises InputError for what is none."""
    # Not splitlines(): a JSON string may hold U+2028 and its like, which Python takes for ends of lines too.
    for number, line in enumerate(render_text(path).removesuffix("\n").split("\n"), 1):
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
        except ValueError as e:
            raise InputError(f"{where}: expected a JSON object, found something else ({e})") from e
        if not isinstance(data, dict):
            raise InputError(f"{where}: expected a JSON object, found {line[:40]}")
        yield number, data


def render_text(path: Path) -> str:
    """A file's text. Raises InputError when it cannot be read, is not UTF-8, or holds nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected UTF-8, found something else ({e})") from e
    if not text.strip():
        raise InputError(f"{path}: expected documents, found an empty file")
    return text


def role_problems(messages: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    """Where roles do not follow each other as in a conversation: the first such place."""
    before: str | None = None
    for n, message in enumerate(messages):
        role = str(message.get("role"))
        if role not in MAY_FOLLOW[before]:
            wanted = " or ".join(sorted(MAY_FOLLOW[before]))
            after = f"after {before}" if before else "at the beginning"
            yield f"{where}: messages[{n}].role: roles out of order: expected {wanted} {after}, found {role}"
            return
        before = "calls" if role == "assistant" and message.get("tool_calls") else role


def _problems(data: dict[str, Any], where: str) -> Iterator[str]:
    for key in data:
        if key not in FORM:
            yield f"{where}: {key}: unknown key; {suggest_name(key, FORM)}"
    for key, (kind, words) in FORM.items():
        if key in data and not isinstance(data[key], kind):
            yield f"{where}: {key}: expected {words}, found {data[key]!r}"
    if "id" not in data:
        yield f"{where}: id: missing"
    if "text" in data:
        if "messages" in data:
            yield f"{where}: text: expected text or messages, found both"
        elif not data["text"]:
            yield f"{where}: text: expected some, found none"
    elif not data.get("messages"):
        yield f"{where}: messages: expected at least one, found none"
    elif isinstance(data["messages"], list):
        yield from _message_problems(data["messages"], where)


def _message_problems(messages: list[Any], where: str) -> Iterator[str]:
    broken = False
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            broken = True
            yield f"{where}: messages[{n}]: expected an object with a role, found {message!r}"
    if not broken:
        yield from role_problems(messages, where)
