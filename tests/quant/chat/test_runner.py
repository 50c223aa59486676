"""Holding a conversation: what a client would stumble over is told, and what the model knew is written down."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from quant.chat.runner import (
    LEAKS,
    SmokeRunner,
    find_call_faults,
    find_reply_faults,
    find_stream_faults,
    make_test_image,
)
from quant.chat.scenarios import Call, Scenario, Scenarios, Step, Tool
from quant.llama.chat_client import (
    ChatClient,
    ChatRequest,
    Message,
    Reply,
    ServerError,
    StreamedReply,
    ToolCall,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = Tool("add", "Adds.", SCHEMA)
ASKED = ChatRequest([], tools=[ADD.declared])
FINE = Reply("", "Hi, Eve!", (), "stop", 10, 4)
CALL = ToolCall("1", "add", '{"a": 1}')


def test_a_good_answer_has_no_faults() -> None:
    assert list(find_reply_faults(FINE, ChatRequest([]))) == []
    assert (
        list(
            find_reply_faults(
                replace(FINE, reasoning="They greet."), ChatRequest([], thinking=True)
            )
        )
        == []
    )
    assert (
        list(find_reply_faults(replace(FINE, finish_reason="length", answer=""), ChatRequest([])))
        == []
    )
    assert list(find_reply_faults(Reply("", "", (CALL,), "tool_calls"), ASKED)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": " \n"}, "the answer is empty"),
        ({"reasoning": "They greet."}, "thinking is off, and the answer came with reasoning"),
        (
            {"finish_reason": "content_filter"},
            "expected finish_reason stop or length, found content_filter",
        ),
        *[
            ({"answer": f"Hi {leak}"}, f"the answer holds the control token {leak}")
            for leak in LEAKS
        ],
    ],
)
def test_every_fault_of_an_answer_is_told(changes: dict[str, Any], said: str) -> None:
    assert list(find_reply_faults(replace(FINE, **changes), ChatRequest([]))) == [said]


def test_an_answer_that_goes_on_behind_its_stop_is_told() -> None:
    assert list(find_reply_faults(replace(FINE, answer="4, 5, 6"), ChatRequest([], stop="5"))) == [
        "the answer goes on behind '5', at which it had to stop"
    ]
    assert list(find_reply_faults(replace(FINE, answer=""), ChatRequest([], stop="5"))) == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"a": 1}', []),
        ('{"a": "1"}', ["the answer.a: expected integer, found '1'"]),
        (
            "no",
            ["expected JSON of the schema, found 'no' (Expecting value: line 1 column 1 (char 0))"],
        ),
    ],
)
def test_an_answer_must_have_the_shape_that_was_asked_for(answer: str, said: list[str]) -> None:
    asked = ChatRequest([], schema=SCHEMA)
    assert list(find_reply_faults(replace(FINE, answer=answer), asked)) == said
    assert (
        list(find_reply_faults(replace(FINE, answer=answer, finish_reason="length"), asked)) == []
    )


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ((), "finish_reason is tool_calls, and there is no call"),
        ((CALL, CALL), "expected an id of its own for each call, found ['1', '1']"),
        ((replace(CALL, id=""),), "expected an id of its own for each call, found ['']"),
        (
            (CALL, replace(CALL, id="2")),
            "expected one call, because several were not allowed, found 2",
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
def test_every_fault_of_a_call_is_told(calls: tuple[ToolCall, ...], said: str) -> None:
    [found, *_] = find_call_faults(Reply("", "", calls, "tool_calls"), ASKED)
    assert found.startswith(said)


def test_arguments_that_were_cut_need_not_be_whole() -> None:
    assert (
        list(find_call_faults(Reply("", "", (replace(CALL, arguments="{"),), "length"), ASKED))
        == []
    )


STREAM = StreamedReply(FINE, ("role", "content", "finish", "usage"), ())


@pytest.mark.parametrize(
    ("streamed", "said"),
    [
        (STREAM, None),
        (
            replace(STREAM, reply=replace(FINE, answer="Hi")),
            "stream: answer: expected as in the whole answer 'Hi, Eve!'",
        ),
        (replace(STREAM, reply=replace(FINE, reasoning="x")), "stream: reasoning: expected"),
        (replace(STREAM, reply=replace(FINE, finish_reason="")), "stream: finish_reason: expected"),
        (
            replace(STREAM, order=("role", "content", "reasoning", "content", "finish", "usage")),
            "stream: expected pieces",
        ),
        (
            replace(STREAM, order=("role", "content", "reasoning", "finish", "usage")),
            "stream: expected pieces",
        ),
        (replace(STREAM, order=("role", "content", "finish")), "stream: expected pieces"),
    ],
)
def test_a_stream_must_say_what_the_whole_answer_says_in_order(
    streamed: StreamedReply, said: str | None
) -> None:
    found = list(find_stream_faults(streamed, FINE))
    assert not found if said is None else (len(found) == 1 and found[0].startswith(said))


def test_the_arguments_of_a_streamed_call_come_in_pieces() -> None:
    whole = Reply("", "", (CALL,), "tool_calls")
    order = ("role", "calls", "finish", "usage")
    assert list(find_stream_faults(StreamedReply(whole, order, (3,)), whole)) == []
    assert list(find_stream_faults(StreamedReply(whole, order, (1,)), whole)) == [
        "stream: expected the arguments of add in several pieces, found 1"
    ]


def test_the_picture_is_a_red_square_that_can_be_read() -> None:
    raw = base64.b64decode(make_test_image().removeprefix("data:image/png;base64,"))
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and raw.endswith(b"IEND\xaeB`\x82")
    start = raw.index(b"IDAT") + 4
    rows = zlib.decompress(raw[start : raw.index(b"IEND") - 8])
    assert len(rows) == 112 * (1 + 3 * 112) and set(rows) == {0, 0xE0, 0x10}


@dataclass
class Scripted:
    """A server that answers from a list, and renders a conversation as its words."""

    replies: list[Reply | Exception]
    forgetful: bool = False
    asked: list[ChatRequest] = field(default_factory=list)

    def render_prompt(
        self, messages: Sequence[Message], thinking: bool, tools: Sequence[Message] = ()
    ) -> str:
        shown = messages[-1:] if self.forgetful else messages
        return "".join(f"<{m['role']}>{m['content']}" for m in shown)

    def count_tokens(self, text: str) -> int:
        return len(text)

    def complete(self, request: ChatRequest) -> Reply:
        self.asked.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def held(
    scenario: Scenario, *replies: Reply | Exception, forgetful: bool = False
) -> tuple[SmokeRunner, Scripted]:
    server = Scripted(list(replies), forgetful)
    holding = SmokeRunner(
        cast(ChatClient, server), Scenarios("s", "For tests.", (scenario,), tools=(ADD,))
    )
    holding.all()
    return holding, server


TWO = Scenario("two", (Step("I am Eve.", "eve"), Step("Who am I?", r"\beve\b")), "Because.")


def test_every_answer_goes_back_with_the_next_question() -> None:
    holding, server = held(TWO, replace(FINE, reasoning="Hm."), FINE)
    [outcome] = holding.outcomes
    assert outcome.detail.startswith("turn 1: thinking is off")
    assert [m["role"] for m in server.asked[1].messages] == ["user", "assistant", "user"]
    assert server.asked[1].messages[1] == {
        "role": "assistant",
        "content": "Hi, Eve!",
        "reasoning_content": "Hm.",
    }


def test_what_the_model_knew_is_written_down_and_is_no_fault() -> None:
    holding, _ = held(TWO, FINE, replace(FINE, answer="You are Rosa.", cached_tokens=10))
    assert holding.outcomes[0].passed
    assert [(a.turn, a.about, a.right) for a in holding.answers] == [
        (1, "answer", True),
        (2, "answer", False),
    ]
    assert [e.question for e in holding.transcript] == ["I am Eve.", "Who am I?"]


def test_an_answer_that_does_not_end_is_not_right() -> None:
    holding, _ = held(TWO, FINE, replace(FINE, finish_reason="length", cached_tokens=10))
    assert (holding.answers[1].right, holding.answers[1].found) == (
        False,
        "Hi, Eve! (it does not end)",
    )


def test_a_server_that_reads_everything_again_is_told() -> None:
    holding, _ = held(TWO, FINE, replace(FINE, cached_tokens=7))
    assert (
        holding.outcomes[0].detail
        == "turn 2: expected the 10 tokens of the prompt before in the cache, found 7"
    )
    assert held(TWO, FINE, replace(FINE, cached_tokens=8))[0].outcomes[0].passed


def test_a_template_that_rewrites_the_past_is_told_with_prompt_and_answer() -> None:
    [outcome] = held(TWO, FINE, replace(FINE, answer="Eve"), forgetful=True)[0].outcomes
    assert outcome.detail.startswith("turn 2: the prompt before is not a prefix of this one")
    assert (outcome.prompt, outcome.answer) == ("<user>Who am I?", "Eve")


def test_thinking_is_asked_for_at_the_first_turn() -> None:
    holding, _ = held(
        replace(TWO, thinking=True), replace(FINE, reasoning="Hm."), replace(FINE, cached_tokens=10)
    )
    assert [(a.about, a.right) for a in holding.answers] == [
        ("reasoning", True),
        ("answer", True),
        ("answer", True),
    ]


TOOLED = Scenario(
    "sum",
    (Step("1 + 1?", "2", (Call("add", {"a": 1}),), ("2",), parts=True),),
    "Because.",
    tools=("add",),
)
CALLED = Reply("", "", (CALL,), "tool_calls", 10)


def test_the_result_of_a_call_goes_back_and_the_answer_is_judged() -> None:
    holding, server = held(TOOLED, CALLED, replace(FINE, answer="It is 2."))
    assert holding.outcomes[0].passed and all(a.right for a in holding.answers)
    assert server.asked[1].messages[-1] == {
        "role": "tool",
        "tool_call_id": "1",
        "content": [{"type": "text", "text": "2"}],
    }
    assert [e.question for e in holding.transcript] == ["1 + 1?", "tool: 2"]


def test_who_does_not_call_is_made_to_so_that_the_protocol_is_tried() -> None:
    holding, server = held(TOOLED, FINE, CALLED, replace(FINE, answer="It is 2."))
    assert [q.tool_required for q in server.asked] == [False, True, False]
    assert holding.outcomes[0].passed
    assert next((a.about, a.right, a.found) for a in holding.answers) == ("calls", False, "no call")


def test_another_call_than_the_right_one_is_no_fault_of_the_protocol() -> None:
    other = replace(CALLED, calls=(replace(CALL, arguments='{"a": 7}'),))
    holding, _ = held(TOOLED, other, FINE)
    assert holding.outcomes[0].passed
    assert [(a.about, a.right) for a in holding.answers] == [("calls", False), ("answer", False)]


def test_a_long_prompt_is_filled_with_small_talk() -> None:
    filled = Scenario(
        "far",
        (Step("I am Eve."), Step("Who am I?", "eve", fill=True)),
        "Because.",
        fill_tokens=1000,
    )
    holding, server = held(filled, FINE, replace(FINE, prompt_tokens=1000, cached_tokens=10))
    assert holding.outcomes[0].passed
    assert 1000 <= len(server.render_prompt(server.asked[1].messages, False)) < 1400
    short, _ = held(filled, FINE, replace(FINE, prompt_tokens=999, cached_tokens=10))
    assert short.outcomes[0].detail == "turn 2: expected a prompt of 1000 tokens, found 999"


def test_what_is_beyond_the_model_must_be_served_whatever_it_says() -> None:
    nonsense = replace(FINE, answer="<think>", cached_tokens=10)
    assert not held(TWO, nonsense, nonsense)[0].outcomes[0].passed
    assert held(replace(TWO, beyond=True), nonsense, nonsense)[0].outcomes[0].passed
    assert (
        not held(replace(TWO, beyond=True), nonsense, ServerError("HTTP 500"))[0].outcomes[0].passed
    )


def test_a_picture_goes_with_the_first_question() -> None:
    _, server = held(replace(TWO, picture=True), FINE, replace(FINE, cached_tokens=10))
    assert [p["type"] for p in server.asked[0].messages[0]["content"]] == ["image_url", "text"]
    assert server.asked[1].messages[-1]["content"] == "Who am I?"


def test_a_refusal_is_told_and_the_next_scenario_tried() -> None:
    holding, _ = held(TWO, ServerError("HTTP 500: no parser"))
    assert (holding.outcomes[0].passed, holding.outcomes[0].detail) == (
        False,
        "HTTP 500: no parser",
    )
    assert holding.outcomes[0].prompt == "<user>I am Eve."


def test_a_refusal_of_a_server_that_is_dead_ends_the_test() -> None:
    def dead() -> None:
        raise RuntimeError("dead")

    holding = SmokeRunner(
        cast(ChatClient, Scripted([ServerError("gone")])),
        Scenarios("s", "For tests.", (TWO,)),
        dead,
    )
    with pytest.raises(RuntimeError, match="dead"):
        holding.all()
