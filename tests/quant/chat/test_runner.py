"""Running scenarios: faults of the protocol are recorded, and so is whether answers are correct."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from quant.chat.runner import SmokeRunner, make_test_image
from quant.chat.scenarios import Call, Scenario, Scenarios, Step
from quant.llama.chat_client import ChatClient, ChatRequest, Message, Reply, ServerError
from tests.quant.chat.templates import GLM
from tests.quant.chat.test_reply_checks import ADD, CALL, FINE


def test_the_test_image_is_a_red_square_that_can_be_read() -> None:
    raw = base64.b64decode(make_test_image().removeprefix("data:image/png;base64,"))
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and raw.endswith(b"IEND\xaeB`\x82")
    start = raw.index(b"IDAT") + 4
    rows = zlib.decompress(raw[start : raw.index(b"IEND") - 8])
    assert len(rows) == 112 * (1 + 3 * 112) and set(rows) == {0, 0xE0, 0x10}


@dataclass
class ScriptedClient:
    """Answers from a list, and renders a conversation as its messages."""

    replies: list[Reply | Exception]
    forgetful: bool = False
    requests: list[ChatRequest] = field(default_factory=list)

    def render_prompt(
        self, messages: Sequence[Message], thinking: bool, tools: Sequence[Message] = ()
    ) -> str:
        shown = messages[-1:] if self.forgetful else messages
        return "".join(f"<{m['role']}>{m['content']}" for m in shown)

    def count_tokens(self, text: str) -> int:
        return len(text)

    def complete(self, request: ChatRequest) -> Reply:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def run_scenario(
    scenario: Scenario, *replies: Reply | Exception, forgetful: bool = False
) -> tuple[SmokeRunner, ScriptedClient]:
    client = ScriptedClient(list(replies), forgetful)
    scenarios = Scenarios("s", "For tests.", (scenario,), tools=(ADD,))
    runner = SmokeRunner(cast(ChatClient, client), scenarios, GLM)
    runner.run_all()
    return runner, client


TWO = Scenario("two", (Step("I am Eve.", "eve"), Step("Who am I?", r"\beve\b")), "Because.")


def test_every_answer_goes_back_with_the_next_question() -> None:
    runner, client = run_scenario(TWO, replace(FINE, reasoning="Hm."), FINE)
    [check] = runner.checks
    assert check.detail.startswith("turn 1: thinking is off")
    assert [m["role"] for m in client.requests[1].messages] == ["user", "assistant", "user"]
    assert client.requests[1].messages[1] == {
        "role": "assistant",
        "content": "Hi, Eve!",
        "reasoning_content": "Hm.",
    }


def test_a_wrong_answer_is_recorded_and_is_no_fault_of_the_protocol() -> None:
    runner, _ = run_scenario(TWO, FINE, replace(FINE, answer="You are Rosa.", cached_tokens=10))
    assert runner.checks[0].passed
    assert [(a.turn, a.about, a.correct) for a in runner.answers] == [
        (1, "answer", True),
        (2, "answer", False),
    ]
    assert [e.question for e in runner.transcript] == ["I am Eve.", "Who am I?"]


def test_an_answer_that_does_not_end_is_not_right() -> None:
    runner, _ = run_scenario(TWO, FINE, replace(FINE, finish_reason="length", cached_tokens=10))
    assert (runner.answers[1].correct, runner.answers[1].actual) == (
        False,
        "Hi, Eve! (it does not end)",
    )


def test_a_server_that_computes_the_prompt_again_is_reported() -> None:
    runner, _ = run_scenario(TWO, FINE, replace(FINE, cached_tokens=7))
    assert (
        runner.checks[0].detail
        == "turn 2: expected the 10 tokens of the previous prompt in the cache, found 7"
    )
    assert run_scenario(TWO, FINE, replace(FINE, cached_tokens=8))[0].checks[0].passed


def test_a_template_that_rewrites_the_past_is_reported_with_prompt_and_answer() -> None:
    [check] = run_scenario(TWO, FINE, replace(FINE, answer="Eve"), forgetful=True)[0].checks
    assert check.detail.startswith("turn 2: the previous prompt is not a prefix of this one")
    assert (check.prompt, check.answer) == ("<user>Who am I?", "Eve")


def test_reasoning_is_expected_at_the_first_turn() -> None:
    runner, _ = run_scenario(
        replace(TWO, thinking=True), replace(FINE, reasoning="Hm."), replace(FINE, cached_tokens=10)
    )
    assert [(a.about, a.correct) for a in runner.answers] == [
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
    runner, client = run_scenario(TOOLED, CALLED, replace(FINE, answer="It is 2."))
    assert runner.checks[0].passed and all(a.correct for a in runner.answers)
    assert client.requests[1].messages[-1] == {
        "role": "tool",
        "tool_call_id": "1",
        "content": [{"type": "text", "text": "2"}],
    }
    assert [e.question for e in runner.transcript] == ["1 + 1?", "tool: 2"]


def test_a_model_that_does_not_call_is_required_to() -> None:
    runner, client = run_scenario(TOOLED, FINE, CALLED, replace(FINE, answer="It is 2."))
    assert [q.tool_required for q in client.requests] == [False, True, False]
    assert runner.checks[0].passed
    assert next((a.about, a.correct, a.actual) for a in runner.answers) == (
        "calls",
        False,
        "no call",
    )


def test_another_call_than_the_right_one_is_no_fault_of_the_protocol() -> None:
    other = replace(CALLED, calls=(replace(CALL, arguments='{"a": 7}'),))
    runner, _ = run_scenario(TOOLED, other, FINE)
    assert runner.checks[0].passed
    assert [(a.about, a.correct) for a in runner.answers] == [("calls", False), ("answer", False)]


def test_a_long_prompt_is_made_with_filler() -> None:
    filled = Scenario(
        "far",
        (Step("I am Eve."), Step("Who am I?", "eve", fill=True)),
        "Because.",
        fill_tokens=1000,
    )
    runner, client = run_scenario(filled, FINE, replace(FINE, prompt_tokens=1000, cached_tokens=10))
    assert runner.checks[0].passed
    assert 1000 <= len(client.render_prompt(client.requests[1].messages, False)) < 1400
    short, _ = run_scenario(filled, FINE, replace(FINE, prompt_tokens=999, cached_tokens=10))
    assert short.checks[0].detail == "turn 2: expected a prompt of 1000 tokens, found 999"


def test_answers_beyond_the_model_are_not_checked_but_must_be_served() -> None:
    nonsense = replace(FINE, answer="<think>", cached_tokens=10)
    assert not run_scenario(TWO, nonsense, nonsense)[0].checks[0].passed
    assert run_scenario(replace(TWO, beyond=True), nonsense, nonsense)[0].checks[0].passed
    assert (
        not run_scenario(replace(TWO, beyond=True), nonsense, ServerError("HTTP 500"))[0]
        .checks[0]
        .passed
    )


def test_an_image_is_sent_with_the_first_question() -> None:
    _, client = run_scenario(replace(TWO, picture=True), FINE, replace(FINE, cached_tokens=10))
    assert [p["type"] for p in client.requests[0].messages[0]["content"]] == ["image_url", "text"]
    assert client.requests[1].messages[-1]["content"] == "Who am I?"


def test_a_refused_request_is_a_fault_and_the_next_scenario_runs() -> None:
    runner, _ = run_scenario(TWO, ServerError("HTTP 500: no parser"))
    assert (runner.checks[0].passed, runner.checks[0].detail) == (
        False,
        "HTTP 500: no parser",
    )
    assert runner.checks[0].prompt == "<user>I am Eve."


def test_a_refusal_of_a_dead_server_ends_the_test() -> None:
    def die() -> None:
        raise RuntimeError("dead")

    runner = SmokeRunner(
        cast(ChatClient, ScriptedClient([ServerError("gone")])),
        Scenarios("s", "For tests.", (TWO,)),
        GLM,
        die,
    )
    with pytest.raises(RuntimeError, match="dead"):
        runner.run_all()
