"""Documents, and the JSON lines that hold them.

A document is one conversation, or one plain text. ``calibration/sets/embedded/README.md`` describes
the form of a line.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.core.data import locate_data
from quant.core.errors import InputError, raise_problems, suggest_name

SETS = locate_data("calibration/sets")
FORM: dict[str, tuple[type, str]] = {
    "id": (str, "text"),
    "language": (str, "text"),
    "thinking": (bool, "true or false"),
    "tools": (list, "a list"),
    "messages": (list, "a list"),
    "text": (str, "text"),
}
"""Keys of a line, with their type. The id is required, and either messages or a text."""
MAY_FOLLOW = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "calls": {"tool"},
    # An assistant may call several tools at once; their results follow each other.
    "tool": {"tool", "assistant"},
}
"""Roles that may follow a role. None is the beginning, ``calls`` an assistant that calls tools."""


@dataclass(frozen=True)
class Document:
    """One conversation, or one plain text."""

    id: str
    language: str
    thinking: bool
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    """Plain text, used as it is, instead of messages."""
    source: str = ""
    kind: str = ""

    def words(self) -> str:
        """Return the text of all messages, without tool declarations and call arguments."""
        parts = (m.get(key) for m in self.messages for key in ("content", "reasoning_content"))
        return "\n".join([self.text or "", *(str(p) for p in parts if p)])

    def json(self) -> dict[str, Any]:
        """Return the document as plain JSON."""
        return asdict(self)


def load_documents(name: str) -> tuple[Document, ...]:
    """Load every document of a folder of JSON lines.

    Args:
        name: Name of a shipped folder, or a path to a folder or file.

    Raises:
        InputError: There are no such files, or a line is broken. File, line and field are named.
    """
    return tuple(document for path in list_set_files(name) for document in read_document_file(path))


def list_set_files(name: str) -> tuple[Path, ...]:
    """Return the files of a folder by its name or path. Raise InputError if there are none."""
    known = sorted(p.name for p in SETS.iterdir() if p.is_dir())
    folder = SETS / name if name in known else Path(name)
    paths = (folder,) if folder.is_file() else tuple(sorted(folder.glob("*.jsonl")))
    if not paths:
        raise InputError(f"calibration set {name!r} is not known: {suggest_name(name, known)}")
    return paths


def read_document_file(path: Path) -> Iterator[Document]:
    """Yield the documents of a file of JSON lines.

    Raises:
        InputError: A line is broken. Every problem of the first such line is listed.
    """
    for number, data in read_json_lines(path):
        raise_problems(_find_line_problems(data, f"{path}:{number}"))
        yield Document(
            id=data["id"],
            language=data.get("language", ""),
            thinking=data.get("thinking", False),
            messages=tuple(data.get("messages", ())),
            tools=tuple(data.get("tools", ())),
            text=data.get("text"),
        )


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines with their line numbers, from 1.

    Raises:
        InputError: The file cannot be read, or a line is no JSON object.
    """
    # Not splitlines(): a JSON string may contain U+2028 and others, which Python takes for line
    # ends too.
    for number, line in enumerate(read_text_file(path).removesuffix("\n").split("\n"), 1):
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
        except ValueError as e:
            raise InputError(f"{where}: expected a JSON object, found something else ({e})") from e
        if not isinstance(data, dict):
            raise InputError(f"{where}: expected a JSON object, found {line[:40]}")
        yield number, data


def read_text_file(path: Path) -> str:
    """Return a file's text. Raise InputError if it cannot be read, is not UTF-8, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected UTF-8, found something else ({e})") from e
    if not text.strip():
        raise InputError(f"{path}: expected documents, found an empty file")
    return text


def find_role_problems(messages: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    """Yield the first place where the roles are not in the order of a conversation, if any."""
    before: str | None = None
    for n, message in enumerate(messages):
        role = str(message.get("role"))
        if role not in MAY_FOLLOW[before]:
            expected = " or ".join(sorted(MAY_FOLLOW[before]))
            after = f"after {before}" if before else "at the beginning"
            yield (
                f"{where}: messages[{n}].role: roles out of order: expected {expected} {after},"
                f" found {role}"
            )
            # Roles after a misplaced one are out of order only because of it.
            return
        before = "calls" if role == "assistant" and message.get("tool_calls") else role


def _find_line_problems(data: dict[str, Any], where: str) -> Iterator[str]:
    for key in data:
        if key not in FORM:
            yield f"{where}: {key}: unknown key; {suggest_name(key, FORM)}"
    for key, (kind, expected) in FORM.items():
        if key in data and not isinstance(data[key], kind):
            yield f"{where}: {key}: expected {expected}, found {data[key]!r}"
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
        yield from _find_message_problems(data["messages"], where)


def _find_message_problems(messages: list[Any], where: str) -> Iterator[str]:
    problems = [
        f"{where}: messages[{n}]: expected an object with a role, found {message!r}"
        for n, message in enumerate(messages)
        if not isinstance(message, dict) or not isinstance(message.get("role"), str)
    ]
    yield from problems
    if not problems:
        yield from find_role_problems(messages, where)
