"""Talking with a server: what is asked, and what is made of its answers, whole and in pieces."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import openai
import pytest

from quant.llama.chat_client import ChatClient, Question, Reply, ServerError, ToolCall

MESSAGES = [{"role": "user", "content": "Hello"}]
ASKED = Question(MESSAGES)
Answer = Callable[[httpx2.Request], httpx2.Response]
Connect = Callable[[Answer], ChatClient]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """A connection to a server that is a function here."""
    with ExitStack() as opened:

        def make(answer: Answer) -> ChatClient:
            http = opened.enter_context(
                openai.DefaultHttpxClient(transport=httpx2.MockTransport(answer))
            )
            client = openai.OpenAI(
                base_url="http://x/v1", api_key="none", max_retries=0, http_client=http
            )
            return ChatClient(client, 77, "http://x")

        yield make


def whole(reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "created": 1,
        "model": "any",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", **message},
                "finish_reason": reason,
            }
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 1,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def say(body: Any) -> Answer:
    return lambda _: httpx2.Response(200, json=body)


def test_an_answer_is_asked_at_temperature_zero_and_taken_apart(connect: Connect) -> None:
    asked: list[dict[str, Any]] = []

    def server(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        assert (request.method, request.url.path) == ("POST", "/v1/chat/completions")
        return httpx2.Response(200, json=whole(reasoning_content="They greet."))

    assert connect(server).answer(Question(MESSAGES, thinking=True)) == Reply(
        "They greet.", "Hi", (), "stop", 10, 4
    )
    [body] = asked
    assert (body["temperature"], body["max_tokens"], body["messages"]) == (0, 77, MESSAGES)
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert not body.keys() & {"tools", "tool_choice", "response_format", "stop", "stream"}


def test_tools_a_schema_and_a_stop_are_asked_for_as_openai_says(connect: Connect) -> None:
    asked: list[dict[str, Any]] = []

    def server(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        return httpx2.Response(200, json=whole())

    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    connect(server).answer(
        Question(MESSAGES, False, [tool], True, True, {"type": "object"}, "5", cached=False)
    )
    [body] = asked
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == (
        [tool],
        "required",
        True,
    )
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert (body["stop"], body["cache_prompt"]) == (["5"], False)


def test_calls_are_taken_as_they_stand(connect: Connect) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": '}}
    reply = connect(say(whole("tool_calls", content=None, tool_calls=[call]))).answer(ASKED)
    assert reply == Reply("", "", (ToolCall("a", "f", '{"x": '),), "tool_calls", 10, 4)
    assert reply.message["tool_calls"] == [call]


@pytest.mark.parametrize(
    "usage", [None, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}]
)
def test_an_answer_may_leave_out_what_is_optional(connect: Connect, usage: Any) -> None:
    body = whole(content=None, reasoning_content=None) | {"usage": usage}
    assert connect(say(body)).answer(ASKED) == Reply("", "", (), "stop", 0, 0)


def events(*deltas: Any, reason: str = "stop", usage: bool = True) -> Answer:
    head = {"id": "1", "created": 1, "model": "any", "object": "chat.completion.chunk"}
    chunks = [head | {"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        chunks.append(head | {"choices": [], "usage": whole()["usage"]})
    text = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    return lambda _: httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})


def piece(index: int, arguments: str, **head: Any) -> dict[str, Any]:
    return {
        "tool_calls": [
            {
                "index": index,
                "function": {"arguments": arguments, **head},
                **({"id": f"c{index}"} if head else {}),
            }
        ]
    }


def test_a_stream_is_put_together_and_its_order_told(connect: Connect) -> None:
    stream = connect(
        events(
            {"role": "assistant", "content": None},
            {"reasoning_content": "They "},
            {"reasoning_content": "greet."},
            {"content": "H"},
            {"content": "i"},
        )
    ).stream(ASKED)
    assert stream.reply == Reply("They greet.", "Hi", (), "stop", 10, 4)
    assert stream.order == ("role", "reasoning", "content", "finish", "usage")


def test_pieces_that_come_back_to_what_was_before_are_told_in_their_order(connect: Connect) -> None:
    stream = connect(events({"content": "a"}, {"reasoning_content": "b"}, {"content": "c"})).stream(
        ASKED
    )
    assert stream.order == ("content", "reasoning", "content", "finish", "usage")


def test_the_pieces_of_calls_are_put_together_each_with_its_own(connect: Connect) -> None:
    stream = connect(
        events(
            {"role": "assistant"},
            piece(0, "{", name="f"),
            piece(0, '"a":1}'),
            piece(1, "{", name="g"),
            piece(1, "}"),
            reason="tool_calls",
            usage=False,
        )
    ).stream(ASKED)
    assert stream.reply.calls == (ToolCall("c0", "f", '{"a":1}'), ToolCall("c1", "g", "{}"))
    assert stream.argument_pieces == (2, 2)
    assert stream.order == ("role", "calls", "finish")


def test_an_error_in_the_middle_of_a_stream_is_told(connect: Connect) -> None:
    text = 'data: {"error": {"code": 500, "message": "does not match the format", "type": "server_error"}}\n\n'
    server = connect(
        lambda _: httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})
    )
    with pytest.raises(ServerError, match="does not match the format"):
        server.stream(ASKED)


def test_a_prompt_is_the_servers_own_rendering(connect: Connect) -> None:
    def server(request: httpx2.Request) -> httpx2.Response:
        assert request.url == "http://x/apply-template"
        return httpx2.Response(
            200, json={"prompt": json.loads(request.content)["chat_template_kwargs"]}
        )

    assert connect(server).prompt(MESSAGES, False) == "{'enable_thinking': False}"


def test_tokens_are_counted_with_control_tokens_for_what_they_are(connect: Connect) -> None:
    def server(request: httpx2.Request) -> httpx2.Response:
        assert json.loads(request.content) == {
            "content": "<|user|>",
            "parse_special": True,
            "add_special": False,
        }
        return httpx2.Response(200, json={"tokens": [1, 2]})

    assert connect(server).token_count("<|user|>") == 2


def test_a_refusal_is_told_with_the_servers_words(connect: Connect) -> None:
    broken = connect(lambda _: httpx2.Response(500, text="no parser " + "x" * 1000))
    with pytest.raises(ServerError, match=r"^HTTP 500: no parser x+$") as caught:
        broken.properties()
    assert len(str(caught.value)) < 550
    with pytest.raises(ServerError, match="HTTP 500"):
        broken.answer(ASKED)


@pytest.mark.parametrize("body", ["text", [], {"choices": []}, {"choices": [{}]}])
def test_an_answer_that_is_none_is_told(connect: Connect, body: Any) -> None:
    with pytest.raises(ServerError):
        connect(say(body)).answer(ASKED)
    with pytest.raises(ServerError):
        connect(say(["x"])).properties()
    with pytest.raises(ServerError):
        connect(say({})).token_count("x")


@pytest.mark.parametrize("status", [200, 503])
def test_a_server_is_ready_when_it_says_so(connect: Connect, status: int) -> None:
    assert connect(lambda _: httpx2.Response(status, json={})).is_ready() is (status == 200)


def test_a_server_that_does_not_answer_is_not_ready(connect: Connect) -> None:
    def nobody(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused", request=request)

    assert not connect(nobody).is_ready()
    with pytest.raises(ServerError, match="Connection error"):
        connect(nobody).answer(ASKED)
