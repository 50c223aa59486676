"""The client of llama-server: the requests it sends, and how it reads replies, whole and streamed."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import openai
import pytest

from quant.llama.chat_client import ChatClient, ChatRequest, Reply, ServerError, ToolCall

MESSAGES = [{"role": "user", "content": "Hello"}]
REQUEST = ChatRequest(MESSAGES)
Answer = Callable[[httpx2.Request], httpx2.Response]
Connect = Callable[[Answer], ChatClient]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Return a function that connects to a server, which is a function of the test."""
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


def completion(reason: str = "stop", **message: Any) -> dict[str, Any]:
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


def answer_with(body: Any) -> Answer:
    return lambda _: httpx2.Response(200, json=body)


def test_a_request_is_sent_at_temperature_zero_and_its_reply_is_parsed(connect: Connect) -> None:
    bodies: list[dict[str, Any]] = []

    def server(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content))
        assert (request.method, request.url.path) == ("POST", "/v1/chat/completions")
        return httpx2.Response(200, json=completion(reasoning_content="They greet."))

    assert connect(server).complete(ChatRequest(MESSAGES, thinking=True)) == Reply(
        "They greet.", "Hi", (), "stop", 10, 4
    )
    [body] = bodies
    assert (body["temperature"], body["max_tokens"], body["messages"]) == (0, 77, MESSAGES)
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert not body.keys() & {"tools", "tool_choice", "response_format", "stop", "stream"}


def test_tools_a_schema_and_a_stop_are_sent_in_openais_form(connect: Connect) -> None:
    bodies: list[dict[str, Any]] = []

    def server(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content))
        return httpx2.Response(200, json=completion())

    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    connect(server).complete(
        ChatRequest(
            MESSAGES, False, [tool], True, True, {"type": "object"}, "5", cache_prompt=False
        )
    )
    [body] = bodies
    assert (body["tools"], body["tool_choice"], body["parallel_tool_calls"]) == (
        [tool],
        "required",
        True,
    )
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert (body["stop"], body["cache_prompt"]) == (["5"], False)


def test_the_arguments_of_calls_are_kept_as_text(connect: Connect) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": '}}
    reply = connect(
        answer_with(completion("tool_calls", content=None, tool_calls=[call]))
    ).complete(REQUEST)
    assert reply == Reply("", "", (ToolCall("a", "f", '{"x": '),), "tool_calls", 10, 4)
    assert reply.message["tool_calls"] == [call]


@pytest.mark.parametrize(
    "usage", [None, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}]
)
def test_optional_fields_of_a_reply_may_be_missing(connect: Connect, usage: Any) -> None:
    body = completion(content=None, reasoning_content=None) | {"usage": usage}
    assert connect(answer_with(body)).complete(REQUEST) == Reply("", "", (), "stop", 0, 0)


def stream_of(*deltas: Any, reason: str = "stop", usage: bool = True) -> Answer:
    head = {"id": "1", "created": 1, "model": "any", "object": "chat.completion.chunk"}
    chunks = [head | {"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        chunks.append(head | {"choices": [], "usage": completion()["usage"]})
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


def test_a_stream_is_put_together_with_the_order_of_its_chunks(connect: Connect) -> None:
    stream = connect(
        stream_of(
            {"role": "assistant", "content": None},
            {"reasoning_content": "They "},
            {"reasoning_content": "greet."},
            {"content": "H"},
            {"content": "i"},
        )
    ).stream(REQUEST)
    assert stream.reply == Reply("They greet.", "Hi", (), "stop", 10, 4)
    assert stream.order == ("role", "reasoning", "content", "finish", "usage")


def test_the_order_of_a_stream_shows_a_kind_that_comes_again(connect: Connect) -> None:
    stream = connect(
        stream_of({"content": "a"}, {"reasoning_content": "b"}, {"content": "c"})
    ).stream(REQUEST)
    assert stream.order == ("content", "reasoning", "content", "finish", "usage")


def test_the_pieces_of_each_call_are_put_together(connect: Connect) -> None:
    stream = connect(
        stream_of(
            {"role": "assistant"},
            piece(0, "{", name="f"),
            piece(0, '"a":1}'),
            piece(1, "{", name="g"),
            piece(1, "}"),
            reason="tool_calls",
            usage=False,
        )
    ).stream(REQUEST)
    assert stream.reply.calls == (ToolCall("c0", "f", '{"a":1}'), ToolCall("c1", "g", "{}"))
    assert stream.argument_pieces == (2, 2)
    assert stream.order == ("role", "calls", "finish")


def test_an_error_in_the_middle_of_a_stream_is_raised(connect: Connect) -> None:
    text = 'data: {"error": {"code": 500, "message": "does not match the format", "type": "server_error"}}\n\n'
    server = connect(
        lambda _: httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})
    )
    with pytest.raises(ServerError, match="does not match the format"):
        server.stream(REQUEST)


def test_a_prompt_is_rendered_by_the_server(connect: Connect) -> None:
    def server(request: httpx2.Request) -> httpx2.Response:
        assert request.url == "http://x/apply-template"
        return httpx2.Response(
            200, json={"prompt": json.loads(request.content)["chat_template_kwargs"]}
        )

    assert connect(server).render_prompt(MESSAGES, False) == "{'enable_thinking': False}"


def test_tokens_are_counted_with_control_tokens_parsed(connect: Connect) -> None:
    def server(request: httpx2.Request) -> httpx2.Response:
        assert json.loads(request.content) == {
            "content": "<|user|>",
            "parse_special": True,
            "add_special": False,
        }
        return httpx2.Response(200, json={"tokens": [1, 2]})

    assert connect(server).count_tokens("<|user|>") == 2


def test_a_refusal_is_raised_with_the_servers_message(connect: Connect) -> None:
    broken = connect(lambda _: httpx2.Response(500, text="no parser " + "x" * 1000))
    with pytest.raises(ServerError, match=r"^HTTP 500: no parser x+$") as caught:
        broken.read_properties()
    assert len(str(caught.value)) < 550
    with pytest.raises(ServerError, match="HTTP 500"):
        broken.complete(REQUEST)


@pytest.mark.parametrize("body", ["text", [], {"choices": []}, {"choices": [{}]}])
def test_an_unusable_answer_is_an_error(connect: Connect, body: Any) -> None:
    with pytest.raises(ServerError):
        connect(answer_with(body)).complete(REQUEST)
    with pytest.raises(ServerError):
        connect(answer_with(["x"])).read_properties()
    with pytest.raises(ServerError):
        connect(answer_with({})).count_tokens("x")


@pytest.mark.parametrize("status", [200, 503])
def test_a_server_is_ready_if_its_health_is_ok(connect: Connect, status: int) -> None:
    assert connect(lambda _: httpx2.Response(status, json={})).is_ready() is (status == 200)


def test_a_server_that_does_not_answer_is_not_ready(connect: Connect) -> None:
    def nobody(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused", request=request)

    assert not connect(nobody).is_ready()
    with pytest.raises(ServerError, match="Connection error"):
        connect(nobody).complete(REQUEST)
