"""Checks of a single reply: every fault that breaks a client is reported."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from quant.chat.families import ReasoningFormat
from quant.chat.reply_checks import find_call_faults, find_reply_faults, find_stream_faults
from quant.chat.scenarios import Tool
from quant.llama.chat_client import ChatRequest, Reply, StreamedReply, ToolCall
from tests.quant.chat.templates import GLM

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = Tool("add", "Adds.", SCHEMA)
WITH_TOOL = ChatRequest([], tools=[ADD.declaration])
FINE = Reply("", "Hi, Eve!", (), "stop", 10, 4)
CALL = ToolCall("1", "add", '{"a": 1}')


def reply_faults(reply: Reply, request: ChatRequest) -> Iterator[str]:
    return find_reply_faults(reply, request, GLM)


def test_a_good_answer_has_no_faults() -> None:
    assert list(reply_faults(FINE, ChatRequest([]))) == []
    assert (
        list(reply_faults(replace(FINE, reasoning="They greet."), ChatRequest([], thinking=True)))
        == []
    )
    assert (
        list(reply_faults(replace(FINE, finish_reason="length", answer=""), ChatRequest([]))) == []
    )
    assert list(reply_faults(Reply("", "", (CALL,), "tool_calls"), WITH_TOOL)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answer": " \n"}, "the answer is empty"),
        ({"reasoning": "They greet."}, "thinking is off, but the reply has reasoning"),
        (
            {"finish_reason": "content_filter"},
            "expected finish_reason stop or length, found content_filter",
        ),
        *[
            ({"answer": f"Hi {token}"}, f"the answer contains the control token {token}")
            for token in GLM.forbidden_in_answers
        ],
    ],
)
def test_every_fault_of_an_answer_is_reported(changes: dict[str, Any], expected: str) -> None:
    assert list(reply_faults(replace(FINE, **changes), ChatRequest([]))) == [expected]


def test_an_answer_that_continues_after_its_stop_sequence_is_reported() -> None:
    assert list(reply_faults(replace(FINE, answer="4, 5, 6"), ChatRequest([], stop="5"))) == [
        "the answer continues after its stop sequence '5'"
    ]
    assert list(reply_faults(replace(FINE, answer=""), ChatRequest([], stop="5"))) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"a": 1}', []),
        ('{"a": "1"}', ["the answer.a: expected integer, found '1'"]),
        (
            "no",
            ["expected JSON of the schema, found 'no' (Expecting value: line 1 column 1 (char 0))"],
        ),
    ],
)
def test_an_answer_must_match_the_requested_schema(answer: str, expected: list[str]) -> None:
    request = ChatRequest([], schema=SCHEMA)
    assert list(reply_faults(replace(FINE, answer=answer), request)) == expected
    assert list(reply_faults(replace(FINE, answer=answer, finish_reason="length"), request)) == []


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ((), "finish_reason is tool_calls, but there is no call"),
        ((CALL, CALL), "expected a different id for each call, found ['1', '1']"),
        ((replace(CALL, id=""),), "expected a different id for each call, found ['']"),
        (
            (CALL, replace(CALL, id="2")),
            "expected one call, because parallel calls are off, found 2",
        ),
        ((replace(CALL, name="sub"),), "call of 'sub', which was not declared"),
        ((replace(CALL, arguments='{"a": "1"}'),), "call of add.a: expected integer, found '1'"),
        ((replace(CALL, arguments="[1]"),), "call of add: expected object, found [1]"),
        ((replace(CALL, arguments="{}"),), "call of add: a: missing"),
        (
            (replace(CALL, arguments='{"a'),),
            "call of add: expected arguments in JSON, found '{\"a'",
        ),
    ],
)
def test_every_fault_of_a_call_is_reported(calls: tuple[ToolCall, ...], expected: str) -> None:
    [faults, *_] = find_call_faults(Reply("", "", calls, "tool_calls"), WITH_TOOL)
    assert faults.startswith(expected)


def test_arguments_cut_by_the_token_limit_may_be_incomplete() -> None:
    assert (
        list(find_call_faults(Reply("", "", (replace(CALL, arguments="{"),), "length"), WITH_TOOL))
        == []
    )


STREAM = StreamedReply(FINE, ("role", "content", "finish", "usage"), ())


@pytest.mark.parametrize(
    ("streamed", "expected"),
    [
        (STREAM, None),
        (
            replace(STREAM, reply=replace(FINE, answer="Hi")),
            "stream: answer: expected 'Hi, Eve!' as in the whole reply",
        ),
        (replace(STREAM, reply=replace(FINE, reasoning="x")), "stream: reasoning: expected"),
        (replace(STREAM, reply=replace(FINE, finish_reason="")), "stream: finish_reason: expected"),
        (
            replace(STREAM, order=("role", "content", "reasoning", "content", "finish", "usage")),
            "stream: expected chunks",
        ),
        (
            replace(STREAM, order=("role", "content", "reasoning", "finish", "usage")),
            "stream: expected chunks",
        ),
        (replace(STREAM, order=("role", "content", "finish")), "stream: expected chunks"),
    ],
)
def test_a_stream_must_have_the_whole_reply_in_order(
    streamed: StreamedReply, expected: str | None
) -> None:
    faults = list(find_stream_faults(streamed, FINE))
    assert not faults if expected is None else (len(faults) == 1 and faults[0].startswith(expected))


def test_the_arguments_of_a_streamed_call_come_in_several_chunks() -> None:
    whole = Reply("", "", (CALL,), "tool_calls")
    order = ("role", "calls", "finish", "usage")
    assert list(find_stream_faults(StreamedReply(whole, order, (3,)), whole)) == []
    assert list(find_stream_faults(StreamedReply(whole, order, (1,)), whole)) == [
        "stream: expected the arguments of add in several chunks, found 1"
    ]


def test_reasoning_that_cannot_be_switched_off_is_no_fault() -> None:
    always = replace(GLM, reasoning=ReasoningFormat("<think>", "</think>"))
    reply = replace(FINE, reasoning="They greet.")
    assert list(find_reply_faults(reply, ChatRequest([]), always)) == []
