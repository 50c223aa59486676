"""Speak with a running llama-server as a client does, and say what is wrong with an answer."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from quant.recipe import Turn

LEAKS = (
    "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "<arg_key>", "<arg_value>", "/nothink", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip
"""Control tokens that belong to the prompt and never to an answer."""


@dataclass(frozen=True)
class Exchange:
    """One question and what came back."""

    thinking: bool
    question: str
    reasoning: str
    answer: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Talk:
    """A connection to one server."""

    http: httpx.Client
    max_answer: int

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        try:
            return self.http.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def properties(self) -> dict[str, Any]:
        """What the server says of the model that it serves."""
        return dict(self._ask("GET", "/props"))

    def prompt(self, messages: Sequence[dict[str, Any]], thinking: bool) -> str:
        """What the model reads before it answers: the server's own rendering."""
        body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
        return str(self._ask("POST", "/apply-template", body)["prompt"])

    def answer(self, messages: Sequence[dict[str, Any]], thinking: bool) -> Exchange:
        """The model's answer to a conversation that ends with a question, at temperature 0."""
        body = {
            "messages": messages, "temperature": 0, "max_tokens": self.max_answer,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }  # fmt: skip
        reply = self._ask("POST", "/v1/chat/completions", body)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice["message"]
        return Exchange(
            thinking, str(messages[-1]["content"]), message.get("reasoning_content") or "", message.get("content") or "",
            choice["finish_reason"], usage.get("prompt_tokens", 0),
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        )  # fmt: skip

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        response = self.http.request(method, path, json=body)
        if response.status_code != 200:
            raise ValueError(f"{path}: HTTP {response.status_code}: {response.text[:300]}")
        return response.json()


def protocol_faults(exchange: Exchange) -> Iterator[str]:
    """What a client would stumble over in an answer, whatever the model knows."""
    if not exchange.answer.strip():
        yield "the answer is empty"
    for leak in LEAKS:
        if leak in exchange.answer:
            yield f"the answer holds the control token {leak}"
    if not exchange.thinking and exchange.reasoning.strip():
        yield "thinking is off, and the answer came with reasoning"
    if exchange.finish_reason not in ("stop", "length"):
        yield f"expected finish_reason stop, found {exchange.finish_reason}"


def off_topic(turns: Sequence[Turn], held: Sequence[Exchange]) -> Iterator[str]:
    """Answers that do not end by themselves, or do not hold what they must."""
    for n, (turn, exchange) in enumerate(zip(turns, held, strict=True), 1):
        if exchange.finish_reason != "stop":
            yield f"turn {n} does not end"
        if not re.search(turn.expect, exchange.answer, re.IGNORECASE):
            yield f"turn {n}, {turn.say!r}: expected {turn.expect!r} in the answer, found {exchange.answer[:120]!r}"
