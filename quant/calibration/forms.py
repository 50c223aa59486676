"""Bring a row of any source to one form: messages (with tools and thinking), or plain text.

Datasets hold conversations in a handful of ways. A row that makes no conversation (an empty answer, roles that do not
follow each other) is left out, and counted by its reason; a column that is not there is an error, because then the whole
source is another.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from quant.calibration.documents import Document, role_problems
from quant.calibration.sets import CalibrationSource
from quant.errors import InputError, raise_problems

Row = Mapping[str, Any]
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "pairs": ("input", "output"),
    "tree": ("message_id", "parent_id", "role", "text", "rank", "lang"),
    "text": ("text",),
}
"""What a form cannot do without; all may be called otherwise in a source."""
ROLES = {
    "human": "user",
    "prompter": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
}
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
THOUGHT = re.compile(r"^\s*<think(?:ing)?>(.*?)</think(?:ing)?>\s*", re.DOTALL)


@dataclass(frozen=True)
class NumberedRow:
    """A row and where it is: ``FILE:ROW``."""

    row: Row
    where: str
    id: str


class SkippedRows(ValueError):  # noqa: N818 - it reads as what happened
    """A row makes no document; why, in words that many rows share."""


def parse_rows(
    rows: Iterable[NumberedRow], source: CalibrationSource, left_out: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents in the rows of a source; ``left_out`` counts what makes none (of trees: conversations) by the reason.

    Rows that the source does not ask for are not counted. Raises InputError for a column that is missing.
    """
    known = False
    kept = []
    for numbered in rows:
        if not known:
            raise_problems(_column_problems(numbered, source))
            known = True
        if _wanted(numbered.row, source):
            kept.append(numbered)
            if source.form != "tree":
                yield from _made(partial(_one, kept.pop(), source), left_out)
    for make in _trees(kept, source) if source.form == "tree" else ():
        yield from _made(make, left_out)


def _made(make: Callable[[], Document], left_out: Counter[str] | None) -> Iterator[Document]:
    try:
        yield make()
    except SkippedRows as e:
        if left_out is not None:
            left_out[str(e)] += 1


def _column_problems(numbered: NumberedRow, source: CalibrationSource) -> Iterator[str]:
    wanted = [source.columns.get(c, c) for c in COLUMNS[source.form]]
    for column in (*wanted, *source.only, *source.without):
        if column not in numbered.row:
            file = numbered.where.rpartition(":")[0]
            yield f"{file}: column {column}: missing; the file of {source.name} has {', '.join(sorted(numbered.row))}"


def _wanted(row: Row, source: CalibrationSource) -> bool:
    return all(str(row.get(c)) in values for c, values in source.only.items()) and not any(
        str(row.get(c)) in values for c, values in source.without.items()
    )


def _one(numbered: NumberedRow, source: CalibrationSource) -> Document:
    def column(name: str) -> Any:
        return numbered.row.get(source.columns.get(name, name))

    if source.form == "text":
        if not isinstance(text := column("text"), str) or not text.strip():
            raise SkippedRows("no text")
        return _document(numbered.id, source, text=text)
    try:
        messages, tools = READ[source.form](column)
    except SkippedRows:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise SkippedRows(f"not of the form {source.form}") from e
    return _conversation(numbered.id, source, messages, tools)


def _conversation(
    id_: str,
    source: CalibrationSource,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    language: str | None = None,
) -> Document:
    """A document, if the messages make one: somebody asks, and the assistant has the last word."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages:
        raise SkippedRows("no answer")
    if not all(str(m["content"]).strip() or m.get("tool_calls") for m in messages):
        raise SkippedRows("an empty message")
    if list(role_problems(messages, id_)):
        raise SkippedRows("roles out of order")
    return _document(id_, source, tuple(messages), tuple(tools), language=language)


def _document(
    id_: str,
    source: CalibrationSource,
    messages: tuple[dict[str, Any], ...] = (),
    tools: tuple[dict[str, Any], ...] = (),
    text: str | None = None,
    language: str | None = None,
) -> Document:
    thinking = bool(messages) and bool(messages[-1].get("reasoning_content"))
    return Document(
        id_, language or source.language, thinking, messages, tools, text, source.name, source.kind
    )


def _messages(column: Callable[[str], Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``[{"role", "content"}]``, as most datasets have it."""
    tools = _decoded(column("tools") or [])
    return [
        _message(m["role"], m["content"] or "", m.get("tool_calls")) for m in column("messages")
    ], tools


def _pairs(column: Callable[[str], Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A question and its answer in a column each."""
    return [_message("user", column("input")), _message("assistant", column("output"))], []


def _sharegpt(column: Callable[[str], Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``[{"from", "value"}]``; calls of tools stand in the text, in Hermes' tags.

    A system message that declares the tools is taken out: the model's own template declares them.
    """
    tools = [
        t if "function" in t else {"type": "function", "function": t}
        for t in _decoded(column("tools") or [])
    ]
    messages: list[dict[str, Any]] = []
    names: list[str] = []
    for turn in column("conversations"):
        role, value = _role(turn["from"]), str(turn["value"])
        if role == "system" and tools and "<tools>" in value:
            continue
        if role == "tool":
            messages += [
                _result(told, names) for told in RESPONSE.findall(value) or [value.strip()]
            ]
            continue
        calls = [_literal(found) for found in CALL.findall(value)] if role == "assistant" else []
        names = [c["name"] for c in calls]
        functions = [{"function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
        messages.append(
            _message(
                role, CALL.sub("", value).strip(), [{"type": "function", **f} for f in functions]
            )
        )
    return messages, tools


def _result(told: str, waiting: list[str]) -> dict[str, Any]:
    """What a tool answered, with the name of its call, which then waits no more: the one it names, else the first."""
    try:
        named = _literal(told)["name"]
    except (ValueError, TypeError, KeyError, IndexError):
        named = None
    if not waiting:
        raise SkippedRows("a result that nobody called for")
    return {
        "role": "tool",
        "content": told,
        "name": waiting.pop(waiting.index(named) if named in waiting else 0),
    }


def _literal(told: str) -> Any:
    """JSON, or what people write who print a dictionary of Python instead. Raises LeftOut for anything else."""
    try:
        return json.loads(told)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(
            json.dumps(ast.literal_eval(told))
        )  # by way of JSON, so that no set or bytes come out
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as e:
        raise SkippedRows("calls or tools that are neither JSON nor a literal of Python") from e


READ = {"messages": _messages, "sharegpt": _sharegpt, "pairs": _pairs}


def _role(told: str) -> str:
    if told not in ROLES:
        raise SkippedRows("a role that is not known")
    return ROLES[told]


def _message(role: str, content: Any, calls: Any = None) -> dict[str, Any]:
    """One message; what an assistant thought is told apart from what it said."""
    message: dict[str, Any] = {"role": _role(role), "content": str(content)}
    if message["role"] == "assistant" and (thought := THOUGHT.match(message["content"])):
        message |= {
            "content": message["content"][thought.end() :],
            "reasoning_content": thought[1].strip(),
        }
    if calls:
        message["tool_calls"] = list(calls)
    return message


def _decoded(tools: Any) -> list[dict[str, Any]]:
    found = _literal(tools) if isinstance(tools, str) else tools
    if not isinstance(found, list):
        raise SkippedRows("tools that are no list")
    return found


def _trees(
    rows: Iterable[NumberedRow], source: CalibrationSource
) -> Iterator[Callable[[], Document]]:
    """One conversation of each tree: at every turn the reply that people ranked best (oasst)."""

    def column(numbered: NumberedRow, name: str) -> Any:
        return numbered.row.get(source.columns.get(name, name))

    roots: list[NumberedRow] = []
    replies: dict[str, list[NumberedRow]] = {}
    for numbered in rows:
        parent = column(numbered, "parent_id")
        (replies.setdefault(str(parent), []) if parent else roots).append(numbered)

    def conversation(root: NumberedRow) -> Document:
        path = [root]
        while below := replies.get(str(column(path[-1], "message_id"))):
            path.append(
                min(below, key=lambda n: (_rank(column(n, "rank")), str(column(n, "message_id"))))
            )
        messages = [_message(str(column(n, "role")), column(n, "text")) for n in path]
        language = str(column(root, "lang") or source.language)
        return _conversation(str(column(root, "message_id")), source, messages, [], language)

    for root in roots:
        yield partial(conversation, root)


def _rank(told: Any) -> float:
    """The best is 0; what nobody ranked comes last."""
    try:
        return float("inf") if told is None else float(told)
    except ValueError as e:
        raise InputError(f"column rank: expected a number, found {told!r}") from e
