"""Checks of a single reply: what breaks a client, whatever the model knows. Pure."""

import json
from collections.abc import Iterator
from typing import Any

from quant.chat.families import ModelFamily
from quant.chat.schema import find_schema_faults
from quant.llama.chat_client import ChatRequest, Reply, StreamedReply, ToolCall

CHUNK_ORDER = ("role", "reasoning", "content", "calls", "finish", "usage")
"""Order of the chunks of a stream, as OpenAI's clients and llama-server's web UI expect it."""
QUOTED_CHARACTERS = 120


def find_reply_faults(reply: Reply, request: ChatRequest, family: ModelFamily) -> Iterator[str]:
    """Yield what is wrong with a reply.

    Args:
        reply: The reply.
        request: What was requested.
        family: The model's family: its control tokens must not occur in the answer.
    """
    reasons = ("stop", "length", "tool_calls") if request.tools else ("stop", "length")
    if reply.finish_reason not in reasons:
        yield f"expected finish_reason {' or '.join(reasons)}, found {reply.finish_reason}"
    # An answer that a stop sequence ends at once is empty, and so is one that was cut by its limit.
    is_complete = reply.finish_reason == "stop" and not request.stop
    if is_complete and not reply.answer.strip() and not reply.calls:
        yield "the answer is empty"
    # A control token in the text means that the parser missed it: the chat shows it to the user.
    for token in family.forbidden_in_answers:
        if token in reply.answer:
            yield f"the answer contains the control token {token}"
    if not request.thinking and reply.reasoning.strip() and not _always_reasons(family):
        yield "thinking is off, but the reply has reasoning"
    if request.stop and request.stop in reply.answer:
        yield f"the answer continues after its stop sequence {request.stop!r}"
    if reply.calls or reply.finish_reason == "tool_calls":
        yield from find_call_faults(reply, request)
    if request.schema is not None and reply.finish_reason == "stop":
        yield from _find_answer_faults(reply.answer, request.schema)


def find_call_faults(reply: Reply, request: ChatRequest) -> Iterator[str]:
    """Yield what is wrong with the tool calls of a reply.

    Arguments must match the declared schema, unless the token limit cut them: llama-server returns
    ``"{"`` then, with finish_reason length.
    """
    declared = {t["function"]["name"]: t["function"]["parameters"] for t in request.tools}
    if not reply.calls:
        yield "finish_reason is tool_calls, but there is no call"
    # Clients send a result back under the id of its call.
    if len(ids := [c.id for c in reply.calls]) != len(set(ids)) or not all(ids):
        yield f"expected a different id for each call, found {ids}"
    if not request.parallel_calls and len(reply.calls) > 1:
        yield f"expected one call, because parallel calls are off, found {len(reply.calls)}"
    for call in reply.calls:
        if call.name not in declared:
            yield f"call of {call.name!r}, which was not declared"
        elif reply.finish_reason != "length":
            yield from _find_argument_faults(call, declared[call.name])


def find_stream_faults(streamed: StreamedReply, whole: Reply) -> Iterator[str]:
    """Yield where a stream differs from the whole reply to the same request.

    llama-server parses a stream piece by piece and a whole reply at once. At temperature 0 and with
    the prompt computed anew, both must have the same fields.
    """
    parts = streamed.reply
    for what, expected, actual in (
        ("reasoning", whole.reasoning, parts.reasoning),
        ("answer", whole.answer, parts.answer),
        ("calls", format_calls(whole), format_calls(parts)),
        ("finish_reason", whole.finish_reason, parts.finish_reason),
    ):
        if expected != actual:
            yield (
                f"stream: {what}: expected {expected[:QUOTED_CHARACTERS]!r} as in the whole reply,"
                f" found {actual[:QUOTED_CHARACTERS]!r}"
            )
    ranks = [CHUNK_ORDER.index(kind) for kind in streamed.order]
    if ranks != sorted(set(ranks)) or not {"role", "finish", "usage"} <= set(streamed.order):
        expected, actual = ", ".join(CHUNK_ORDER), ", ".join(streamed.order)
        yield f"stream: expected chunks in the order {expected}, found {actual}"
    # A server that holds the arguments back until they are complete makes the client wait.
    for call, pieces in zip(parts.calls, streamed.argument_pieces, strict=True):
        if pieces < 2 and len(call.arguments) > len("{}"):
            yield f"stream: expected the arguments of {call.name} in several chunks, found {pieces}"


def format_calls(reply: Reply) -> str:
    """Return the tool calls of a reply as text."""
    return ", ".join(f"{c.name}({c.arguments})" for c in reply.calls)


def _always_reasons(family: ModelFamily) -> bool:
    # Without a switch the template has no way to pass the client's wish on to the model.
    return family.reasoning is not None and not family.reasoning.switch


def _find_answer_faults(answer: str, schema: Any) -> Iterator[str]:
    try:
        yield from find_schema_faults(json.loads(answer), schema, "the answer")
    except ValueError as e:
        yield f"expected JSON of the schema, found {answer[:QUOTED_CHARACTERS]!r} ({e})"


def _find_argument_faults(call: ToolCall, schema: Any) -> Iterator[str]:
    name = f"call of {call.name}"
    try:
        # Arguments are an object, even where the declaration forgets to say so.
        yield from find_schema_faults(
            json.loads(call.arguments), {"type": "object", **schema}, name
        )
    except ValueError as e:
        actual = call.arguments[:QUOTED_CHARACTERS]
        yield f"{name}: expected arguments in JSON, found {actual!r} ({e})"
