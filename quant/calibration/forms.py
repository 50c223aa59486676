"""Convert rows of datasets to documents: messages with tools and reasoning, or plain text. Pure.

Datasets hold conversations in a handful of forms. A row that makes no conversation (an empty
answer, roles out of order) is skipped and counted by its reason. A missing column is an error: then
the whole source has another form.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from quant.calibration.documents import Document, find_role_problems
from quant.calibration.sets import CalibrationSource
from quant.core.errors import InputError, raise_problems

Row = Mapping[str, Any]
Message = dict[str, Any]
ColumnReader = Callable[[str], Any]
"""Returns the value of a row's column, by the name that the form uses."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "pairs": ("input", "output"),
    "tree": ("message_id", "parent_id", "role", "text", "rank", "lang"),
    "text": ("text",),
}
"""Columns that a form requires. A source may map each to another name."""
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
"""Our role for each name of a role in datasets."""
# Tags of the Hermes format, https://github.com/NousResearch/Hermes-Function-Calling
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
REASONING = re.compile(r"^\s*<think(?:ing)?>(.*?)</think(?:ing)?>\s*", re.DOTALL)


@dataclass(frozen=True)
class NumberedRow:
    """A row and its position."""

    row: Row
    where: str
    """FILE:ROW"""
    id: str


class RowError(ValueError):
    """A row makes no document. The text is a reason that many rows share.

    Reasons are counted in lock files, so their wording should stay.
    """


def parse_rows(
    rows: Iterable[NumberedRow], source: CalibrationSource, left_out: Counter[str] | None = None
) -> Iterator[Document]:
    """Yield the documents in the rows of a source.

    Args:
        rows: Rows of all files of the source.
        source: The form, the names of its columns, and which rows to take.
        left_out: Counts the rows that make no document by their reason; of trees, the
            conversations. Rows that the source does not ask for are not counted.

    Raises:
        InputError: A column is missing.
    """
    columns_checked = False
    tree_rows = []
    for numbered in rows:
        # The first row stands for all: in another form each of a million rows would report it.
        if not columns_checked:
            raise_problems(_find_column_problems(numbered, source))
            columns_checked = True
        if not _is_selected(numbered.row, source):
            continue
        if source.form == "tree":  # a conversation may be anywhere in the files
            tree_rows.append(numbered)
        else:
            yield from _try_make(partial(_make_document, numbered, source), left_out)
    for make in _list_conversations(tree_rows, source):
        yield from _try_make(make, left_out)


def _try_make(make: Callable[[], Document], left_out: Counter[str] | None) -> Iterator[Document]:
    try:
        yield make()
    except RowError as e:
        if left_out is not None:
            left_out[str(e)] += 1


def _find_column_problems(numbered: NumberedRow, source: CalibrationSource) -> Iterator[str]:
    required = [source.columns.get(c, c) for c in COLUMNS[source.form]]
    for column in (*required, *source.only, *source.without):
        if column not in numbered.row:
            file = numbered.where.rpartition(":")[0]
            yield (
                f"{file}: column {column}: missing; the file of {source.name} has"
                f" {', '.join(sorted(numbered.row))}"
            )


def _is_selected(row: Row, source: CalibrationSource) -> bool:
    # str(): a set has texts, a column may have numbers or booleans ("True").
    return all(str(row.get(c)) in values for c, values in source.only.items()) and not any(
        str(row.get(c)) in values for c, values in source.without.items()
    )


def _make_document(numbered: NumberedRow, source: CalibrationSource) -> Document:
    def read_column(name: str) -> Any:
        return numbered.row.get(source.columns.get(name, name))

    if source.form == "text":
        if not isinstance(text := read_column("text"), str) or not text.strip():
            raise RowError("no text")
        return _tag(numbered.id, source, text=text)
    try:
        messages, tools = READERS[source.form](read_column)
    # RowError is a ValueError, and its own reason is more exact than the one below.
    except RowError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise RowError(f"not of the form {source.form}") from e
    return _make_conversation(numbered.id, source, messages, tools)


def _make_conversation(
    id_: str,
    source: CalibrationSource,
    messages: list[Message],
    tools: list[dict[str, Any]],
    language: str | None = None,
) -> Document:
    """Return a document that ends with an answer of the assistant, or raise RowError."""
    # Trees and chat logs often end with a question that nobody answered.
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError("no answer")
    if not all(str(m["content"]).strip() or m.get("tool_calls") for m in messages):
        raise RowError("an empty message")
    if list(find_role_problems(messages, id_)):
        raise RowError("roles out of order")
    return _tag(id_, source, messages=tuple(messages), tools=tuple(tools), language=language)


def _tag(
    id_: str,
    source: CalibrationSource,
    *,
    messages: tuple[Message, ...] = (),
    tools: tuple[dict[str, Any], ...] = (),
    text: str | None = None,
    language: str | None = None,
) -> Document:
    """Return a document with the source's name, kind and language."""
    return Document(
        id=id_,
        language=language or source.language,
        thinking=bool(messages) and bool(messages[-1].get("reasoning_content")),
        messages=messages,
        tools=tools,
        text=text,
        source=source.name,
        kind=source.kind,
    )


# ---- one reader for each form: messages and tools of a row


def _read_messages(read_column: ColumnReader) -> tuple[list[Message], list[dict[str, Any]]]:
    """Read ``[{"role", "content"}]``, the form of most datasets."""
    tools = _parse_tools(read_column("tools") or [])
    return [
        _make_message(m["role"], m["content"] or "", m.get("tool_calls"))
        for m in read_column("messages")
    ], tools


def _read_pairs(read_column: ColumnReader) -> tuple[list[Message], list[dict[str, Any]]]:
    """Read a question and its answer from a column each."""
    return [
        _make_message("user", read_column("input")),
        _make_message("assistant", read_column("output")),
    ], []


def _read_sharegpt(read_column: ColumnReader) -> tuple[list[Message], list[dict[str, Any]]]:
    """Read ``[{"from", "value"}]``, with tool calls in the text in Hermes' tags."""
    tools = [
        t if "function" in t else {"type": "function", "function": t}
        for t in _parse_tools(read_column("tools") or [])
    ]
    messages: list[Message] = []
    pending: list[str] = []  # names of calls without a result
    for turn in read_column("conversations"):
        role, value = _parse_role(turn["from"]), str(turn["value"])
        # The model's own template declares the tools; Hermes' declaration would be a second one.
        if role == "system" and tools and "<tools>" in value:
            continue
        if role == "tool":
            # Several results may stand in one turn, each in a tag of its own.
            results = RESPONSE.findall(value) or [value.strip()]
            messages += [_make_result(result, pending) for result in results]
            continue
        calls = [_parse_literal(c) for c in CALL.findall(value)] if role == "assistant" else []
        # Set at every turn: a result has to follow its call at once, or its row is left out.
        pending = [c["name"] for c in calls]
        functions = [{"name": c["name"], "arguments": c["arguments"]} for c in calls]
        tool_calls = [{"type": "function", "function": f} for f in functions]
        messages.append(_make_message(role, CALL.sub("", value).strip(), tool_calls))
    return messages, tools


READERS = {"messages": _read_messages, "sharegpt": _read_sharegpt, "pairs": _read_pairs}


def _make_result(result: str, pending: list[str]) -> Message:
    """Return a tool's result, and remove its call from the pending ones.

    It belongs to the call that it names, otherwise to the first one.
    """
    try:
        name = _parse_literal(result)["name"]
    except (ValueError, TypeError, KeyError, IndexError):
        name = None
    if not pending:
        raise RowError("a result that nobody called for")
    call = pending.pop(pending.index(name) if name in pending else 0)
    return {"role": "tool", "content": result, "name": call}


def _parse_literal(text: str) -> Any:
    """Parse JSON or a Python literal, or raise RowError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        # Some datasets hold str(dict) instead of JSON. literal_eval reads literals and runs
        # nothing.
        # By way of JSON, so that no set or bytes come out.
        return json.loads(json.dumps(ast.literal_eval(text)))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as e:
        raise RowError("calls or tools that are neither JSON nor a literal of Python") from e


def _parse_role(name: str) -> str:
    if name not in ROLES:
        raise RowError("a role that is not known")
    return ROLES[name]


def _make_message(role: str, content: Any, calls: Any = None) -> Message:
    """Return a message, with the reasoning at its beginning as ``reasoning_content``."""
    message: Message = {"role": _parse_role(role), "content": str(content)}
    # Templates write reasoning in their family's tags, from reasoning_content. A dataset's
    # <thinking> in the content would be rendered as a part of the answer.
    if message["role"] == "assistant" and (reasoning := REASONING.match(message["content"])):
        message |= {
            "content": message["content"][reasoning.end() :],
            "reasoning_content": reasoning[1].strip(),
        }
    if calls:
        message["tool_calls"] = list(calls)
    return message


def _parse_tools(tools: Any) -> list[dict[str, Any]]:
    declarations = _parse_literal(tools) if isinstance(tools, str) else tools
    if not isinstance(declarations, list):
        raise RowError("tools that are no list")
    return declarations


# ---- trees


def _list_conversations(
    rows: Iterable[NumberedRow], source: CalibrationSource
) -> Iterator[Callable[[], Document]]:
    """Yield a function for each tree that makes its conversation from the best ranked replies.

    This is the form of oasst: a row is one message, and knows its parent.
    """

    def read(numbered: NumberedRow, name: str) -> Any:
        return numbered.row.get(source.columns.get(name, name))

    def rank_reply(reply: NumberedRow) -> tuple[float, str]:
        # The id makes the choice unique where people ranked two replies alike.
        return _parse_rank(read(reply, "rank")), str(read(reply, "message_id"))

    roots: list[NumberedRow] = []
    replies: dict[str, list[NumberedRow]] = {}
    for numbered in rows:
        parent = read(numbered, "parent_id")
        (replies.setdefault(str(parent), []) if parent else roots).append(numbered)

    def make_conversation(root: NumberedRow) -> Document:
        path = [root]
        while below := replies.get(str(read(path[-1], "message_id"))):
            path.append(min(below, key=rank_reply))
        messages = [_make_message(str(read(n, "role")), read(n, "text")) for n in path]
        language = str(read(root, "lang") or source.language)
        return _make_conversation(str(read(root, "message_id")), source, messages, [], language)

    for root in roots:
        yield partial(make_conversation, root)


def _parse_rank(rank: Any) -> float:
    """Return a rank as a number: 0 is the best, and an unranked reply comes last."""
    try:
        return float("inf") if rank is None else float(rank)
    except ValueError as e:
        raise InputError(f"column rank: expected a number, found {rank!r}") from e
