"""Talking with a server: what is asked, what is made of its answers, and what is wrong with them."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from quant.recipe import Turn
from quant.talk import LEAKS, Exchange, Talk, off_topic, protocol_faults

FINE = Exchange(False, "Hello", "", "Hi, Eve!", "stop", 10, 4)
MESSAGES = [{"role": "user", "content": "Hello"}]


def changed(**fields: Any) -> Exchange:
    return Exchange(**{**FINE.__dict__, **fields})


def talk(answer: Callable[[httpx.Request], httpx.Response]) -> Talk:
    return Talk(httpx.Client(base_url="http://127.0.0.1:1", transport=httpx.MockTransport(answer)), 77)


def reply(**message: Any) -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": "Hi", **message}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}},
    }


def test_a_good_answer_has_no_faults() -> None:
    assert list(protocol_faults(FINE)) == []
    assert list(protocol_faults(changed(thinking=True, reasoning="They greet."))) == []
    assert list(protocol_faults(changed(finish_reason="length"))) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer": " \n"}, "the answer is empty"),
        ({"reasoning": "They greet."}, "thinking is off, and the answer came with reasoning"),
        ({"finish_reason": "tool_calls"}, "expected finish_reason stop, found tool_calls"),
        *[({"answer": f"Hi {leak}"}, f"the answer holds the control token {leak}") for leak in LEAKS],
    ],
)
def test_every_fault_of_an_answer_is_told(fields: dict[str, Any], said: str) -> None:
    assert list(protocol_faults(changed(**fields))) == [said]


def test_several_faults_are_told_together() -> None:
    assert len(list(protocol_faults(changed(answer="<think>x</think>", reasoning="y")))) == 3


TURNS = (Turn("I am Eve.", "eve"), Turn("What is 2 + 3?", r"\b5\b"))


def test_answers_on_the_topic_pass_whatever_their_case() -> None:
    assert list(off_topic(TURNS, [FINE, changed(answer="It is 5.")])) == []


def test_answers_off_the_topic_or_without_an_end_are_told_with_their_turn() -> None:
    found = list(off_topic(TURNS, [changed(finish_reason="length"), changed(answer="x" * 500)]))
    assert found[0] == "turn 1 does not end"
    assert found[1].startswith(r"turn 2, 'What is 2 + 3?': expected '\\b5\\b' in the answer, found 'xxx")
    assert len(found[1]) < 250


def test_a_conversation_that_broke_off_is_not_judged_by_half() -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(off_topic(TURNS, [FINE]))


def test_an_answer_is_asked_at_temperature_zero_and_taken_apart() -> None:
    asked: list[dict[str, Any]] = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        assert (request.method, request.url.path) == ("POST", "/v1/chat/completions")
        return httpx.Response(200, json=reply(reasoning_content="They greet."))

    assert talk(server).answer(MESSAGES, True) == Exchange(True, "Hello", "They greet.", "Hi", "stop", 10, 4)
    [body] = asked
    assert (body["temperature"], body["max_tokens"], body["messages"]) == (0, 77, MESSAGES)
    assert body["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens_details": None}])
def test_an_answer_may_leave_out_what_is_optional(usage: Any) -> None:
    body = reply(content=None, reasoning_content=None) | {"usage": usage}
    exchange = talk(lambda _: httpx.Response(200, json=body)).answer(MESSAGES, False)
    assert exchange == Exchange(False, "Hello", "", "", "stop", 0, 0)


def test_a_prompt_is_the_servers_own_rendering() -> None:
    def server(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/apply-template"
        return httpx.Response(200, json={"prompt": json.loads(request.content)["chat_template_kwargs"]})

    assert talk(server).prompt(MESSAGES, False) == "{'enable_thinking': False}"


def test_a_refusal_is_told_with_the_servers_words() -> None:
    broken = talk(lambda _: httpx.Response(500, text="no parser " + "x" * 1000))
    with pytest.raises(ValueError, match=r"^/props: HTTP 500: no parser x+$") as caught:
        broken.properties()
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize("status", [200, 503])
def test_a_server_is_ready_when_it_says_so(status: int) -> None:
    assert talk(lambda _: httpx.Response(status)).is_ready() is (status == 200)


def test_a_server_that_does_not_answer_is_not_ready() -> None:
    def nobody(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    assert not talk(nobody).is_ready()
