"""Run the scenarios of a smoke test against a running server, and record the checks.

Protocol checks are the same for every file: requests succeed, replies are well-formed
(:mod:`quant.chat.reply_checks`), prompts grow and are reused from the cache. Whether an answer is
correct is only recorded; :mod:`quant.chat.verdict` judges it.
"""

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quant.chat.families import ModelFamily
from quant.chat.reply_checks import find_reply_faults, find_stream_faults, format_calls
from quant.chat.scenarios import Call, Scenario, Scenarios, Step
from quant.chat.verdict import AnswerCheck, CheckResult, Exchange
from quant.llama.chat_client import ChatClient, ChatRequest, Message, Reply, ServerError, ToolCall

SLACK_TOKENS = 2
"""Tokens of a prompt that need not be cached.

The next prompt closes the reasoning that a generation prompt opens: its last token differs.
"""
FILLER = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Count to 5.", "1, 2, 3, 4, 5"),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("Say the word river.", "river"),
)
"""Questions and answers between a fact and the question about it, in a long prompt."""
IMAGE_PIXELS = 112
ANSWER_CHARACTERS = 200


@dataclass
class SmokeRunner:
    """Runs scenarios with one file and records the results."""

    client: ChatClient
    scenarios: Scenarios
    family: ModelFamily
    explain_failure: Callable[[], None] = lambda: None
    """Called when a request failed. Raises if the server has died."""
    checks: list[CheckResult] = field(default_factory=list)
    answers: list[AnswerCheck] = field(default_factory=list)
    transcript: list[Exchange] = field(default_factory=list)
    last_prompt: str = ""
    last_answer: str = ""

    def run_all(self) -> None:
        """Run every scenario of the set."""
        for scenario in self.scenarios.scenarios:
            self.record(scenario.name, self.run_scenario(scenario))

    def record(self, name: str, faults: Iterable[str]) -> None:
        """Record a protocol check, with the prompt and the answer of its first fault.

        Args:
            name: The check's name.
            faults: Nothing if the check passes. A request that the server refuses is a fault too,
                and ends the check.
        """
        details: list[str] = []
        self.last_prompt = self.last_answer = prompt = answer = ""

        def add(fault: str) -> None:
            nonlocal prompt, answer
            if not details:
                prompt, answer = self.last_prompt, self.last_answer
            details.append(fault)

        try:
            # The faults are a generator that talks to the server: a refused request raises here.
            for fault in faults:
                add(fault)
        except ServerError as e:
            self.explain_failure()
            add(str(e))
        detail = "; ".join(details) or "ok"
        self.checks.append(CheckResult(name, "protocol", not details, detail, prompt, answer))

    def run_scenario(self, scenario: Scenario) -> Iterator[str]:
        """Run one conversation, turn by turn, and yield its faults."""
        history: list[Message] = []
        previous: tuple[str, int] | None = None
        for n, step in enumerate(scenario.turns, 1):
            if step.fill:
                history += self._make_filler(scenario, history)
            history.append(_make_question(step, with_image=scenario.picture and n == 1))
            request = self._make_request(scenario, history)
            self.last_prompt = self.client.render_prompt(history, scenario.thinking, request.tools)
            replies: list[Reply] = []
            for fault in self._run_turn(scenario, n, request, history, replies):
                yield f"turn {n}: {fault}"
            first = replies[0]
            if previous:
                # After a tool call the last prompt is the one with the result.
                yield from self._find_cache_faults(n, previous, self.last_prompt, first)
            if step.fill and first.prompt_tokens < scenario.fill_tokens:
                yield (
                    f"turn {n}: expected a prompt of {scenario.fill_tokens} tokens,"
                    f" found {first.prompt_tokens}"
                )
            # A tool loop may drop its reasoning at the next question, so its prompt is no prefix.
            previous = None if first.calls else (self.last_prompt, first.prompt_tokens)
            history.append(replies[-1].message)

    def _run_turn(
        self,
        scenario: Scenario,
        n: int,
        request: ChatRequest,
        history: list[Message],
        replies: list[Reply],
    ) -> Iterator[str]:
        """Run one turn, with the tool calls on the way; replies are appended to ``replies``."""
        step = scenario.turns[n - 1]
        reply = yield from self._run_request(scenario, step.say, request)
        replies.append(reply)

        def check(about: str, expected: str, actual: str, correct: bool) -> None:
            self.answers.append(
                AnswerCheck(scenario.name, n, about, step.say, expected, actual, correct)
            )

        # Not required of later turns, at which a model may answer without reasoning.
        if scenario.thinking and n == 1:
            check("reasoning", "something", reply.reasoning, bool(reply.reasoning.strip()))
        if step.calls:
            calls = [Call(c.name, _parse_arguments(c)) for c in reply.calls]
            correct = _sort_calls(calls) == _sort_calls(step.calls)
            check("calls", _describe_calls(step.calls), _describe_calls(calls), correct)
            if not reply.calls:
                # The model did not call. The protocol is tested all the same: the call is required.
                required = self._make_request(scenario, history, tool_required=True)
                reply = yield from self._run_request(scenario, step.say, required)
            if reply.calls and reply.finish_reason == "tool_calls":
                history += [reply.message, *_make_results(step, reply.calls)]
                self.last_prompt = self.client.render_prompt(
                    history, scenario.thinking, request.tools
                )
                with_results = self._make_request(scenario, history)
                reply = yield from self._run_request(
                    scenario, _describe_results(history), with_results
                )
                replies.append(reply)
        if step.expect is not None:
            ended = reply.finish_reason == "stop"
            correct = ended and re.search(step.expect, reply.answer, re.IGNORECASE) is not None
            actual = reply.answer[:ANSWER_CHARACTERS] + ("" if ended else " (it does not end)")
            check("answer", repr(step.expect), actual, correct)

    def _run_request(
        self, scenario: Scenario, question: str, request: ChatRequest
    ) -> Generator[str, None, Reply]:
        """Send a request, and again as a stream if the scenario says so."""
        reply = self.client.complete(request)
        self.last_answer = reply.answer or format_calls(reply)
        self.transcript.append(
            Exchange(
                scenario=scenario.name,
                thinking=scenario.thinking,
                question=question,
                reasoning=reply.reasoning,
                answer=reply.answer,
                calls=tuple(f"{c.name}({c.arguments})" for c in reply.calls),
                finish_reason=reply.finish_reason,
                prompt_tokens=reply.prompt_tokens,
                cached_tokens=reply.cached_tokens,
            )
        )
        if not scenario.beyond:
            yield from find_reply_faults(reply, request, self.family)
        if scenario.stream:
            yield from find_stream_faults(self.client.stream(request), reply)
        return reply

    def _make_request(
        self, scenario: Scenario, history: Sequence[Message], tool_required: bool = False
    ) -> ChatRequest:
        return ChatRequest(
            messages=list(history),
            thinking=scenario.thinking,
            tools=self.scenarios.declare_tools(scenario.tools),
            parallel_calls=scenario.parallel,
            tool_required=tool_required,
            schema=scenario.schema,
            stop=scenario.stop,
            # Whole and streamed replies must be equal. A cached prefix is computed in other
            # batches and rounds otherwise, so both requests process the whole prompt.
            cache_prompt=not scenario.stream,
        )

    def _make_filler(self, scenario: Scenario, history: Sequence[Message]) -> list[Message]:
        """Turns that lengthen the prompt to the scenario's ``fill_tokens``, by whole rounds."""
        filler = [m for turn in FILLER for m in _make_turn(*turn)]

        def count(messages: Sequence[Message]) -> int:
            return self.client.count_tokens(self.client.render_prompt(messages, scenario.thinking))

        length = count(history)
        # A difference, because both counts have the start and the generation prompt in them.
        per_round = max(1, count([*history, *filler]) - length)
        missing = scenario.fill_tokens - length
        return filler * max(1, -(-missing // per_round))

    def _find_cache_faults(
        self, n: int, previous: tuple[str, int], prompt: str, reply: Reply
    ) -> Iterator[str]:
        """Each prompt begins the next one, and the server does not compute it again.

        Otherwise every turn costs the whole conversation again: minutes on a large model.
        """
        text, tokens = previous
        # A generation prompt that opens the reasoning is closed once the answer is in the past.
        opening = self.family.reasoning.open if self.family.reasoning else ""
        if not prompt.startswith(text.removesuffix(opening)):
            yield (
                f"turn {n}: the previous prompt is not a prefix of this one: the template rewrites"
                " the past"
            )
        elif reply.cached_tokens < tokens - SLACK_TOKENS:
            yield (
                f"turn {n}: expected the {tokens} tokens of the previous prompt in the cache,"
                f" found {reply.cached_tokens}"
            )


def make_test_image() -> str:
    """Return a red square as a data URL: a PNG made here, so that the project ships no image."""
    # Each row begins with its filter type (PNG specification): 0, none.
    rows = (b"\0" + b"\xe0\x10\x10" * IMAGE_PIXELS) * IMAGE_PIXELS
    size = struct.pack(">IIBBBBB", IMAGE_PIXELS, IMAGE_PIXELS, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    encoded = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(encoded)
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _make_question(step: Step, *, with_image: bool) -> Message:
    if not with_image:
        return {"role": "user", "content": step.say}
    parts = [
        {"type": "image_url", "image_url": {"url": make_test_image()}},
        {"type": "text", "text": step.say},
    ]
    return {"role": "user", "content": parts}


def _make_turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _make_results(step: Step, calls: Sequence[ToolCall]) -> list[Message]:
    """Results for the calls that were made, which may be others than the expected ones."""
    texts = [step.results[n % len(step.results)] for n in range(len(calls))]
    contents: list[Any] = [
        [{"type": "text", "text": text}] if step.parts else text for text in texts
    ]
    return [
        {"role": "tool", "tool_call_id": call.id, "content": content}
        for call, content in zip(calls, contents, strict=True)
    ]


def _describe_results(history: Sequence[Message]) -> str:
    """The tool results of a conversation, for the transcript."""
    contents = [m["content"] for m in history if m["role"] == "tool"]
    return "tool: " + ", ".join(c if isinstance(c, str) else c[0]["text"] for c in contents)


def _parse_arguments(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call. Text that is no JSON object is kept under ``?``; it equals none."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"?": call.arguments}


def _sort_calls(calls: Sequence[Call]) -> list[tuple[str, str]]:
    """Calls in an order of their own: models make parallel calls in any order."""
    return sorted((c.name, json.dumps(c.arguments, sort_keys=True)) for c in calls)


def _describe_calls(calls: Sequence[Call]) -> str:
    described = (f"{c.name}({json.dumps(c.arguments, ensure_ascii=False)})" for c in calls)
    return ", ".join(described) or "no call"
