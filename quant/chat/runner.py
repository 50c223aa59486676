"""Hold the conversations of a smoke test with a running server, and say what a client would stumble over.

What is checked here holds for every file, whatever the model knows: that requests succeed, no control token leaks into an
answer, thinking is where it belongs, prompts grow and are kept in the cache, calls are JSON of the declared shape, and a
stream says what the whole answer says. What the model knew is only written down.
"""

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quant.chat.scenarios import Call, Scenario, Scenarios, Step, find_schema_faults
from quant.chat.verdict import Answer, Exchange, Outcome
from quant.llama.chat_client import (
    ChatClient,
    ChatRequest,
    Message,
    Reply,
    ServerError,
    StreamedReply,
    ToolCall,
)

LEAKS = (
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|system|>",
    "[gMASK]",
    "<sop>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "<arg_value>",
    "/nothink",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
)
"""Control tokens that belong to the prompt and never to an answer."""
OPEN = "<think>"
ORDER = ("role", "reasoning", "content", "calls", "finish", "usage")
"""In which the pieces of a stream come."""
SLACK_TOKENS = 2
"""A generation prompt that opens the reasoning is closed in the next prompt: its last token is not found again."""
SMALL_TALK = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Count to 5.", "1, 2, 3, 4, 5"),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("Say the word river.", "river"),
)
"""What stands between a fact and the question about it in a long prompt."""
PICTURE_PIXELS = 112
Kind = Literal["protocol", "quality"]


@dataclass
class SmokeRunner:
    """The conversations with one file, and what came of them."""

    talk: ChatClient
    tried: Scenarios
    check_dead: Callable[[], None] = lambda: None
    """Called when a request failed; raises when the server is no more."""
    outcomes: list[Outcome] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    transcript: list[Exchange] = field(default_factory=list)
    prompt: str = ""
    """What was last sent to the model."""
    said: str = ""
    """What it last said."""

    def all(self) -> None:
        """Every scenario of the set."""
        for scenario in self.tried.scenarios:
            self.note(scenario.name, self.hold(scenario))

    def note(self, name: str, faults: Iterator[str], kind: Kind = "protocol") -> None:
        """An outcome that passed when it yields no fault; a request that is refused is a fault too."""
        found: list[str] = []
        self.prompt = self.said = prompt = said = ""
        try:
            for fault in faults:
                prompt, said = (prompt, said) if found else (self.prompt, self.said)
                found.append(fault)
        except ServerError as e:
            self.check_dead()
            prompt, said = (prompt, said) if found else (self.prompt, self.said)
            found.append(str(e))
        self.outcomes.append(Outcome(name, kind, not found, "; ".join(found) or "ok", prompt, said))

    def hold(self, scenario: Scenario) -> Iterator[str]:
        """One conversation, turn by turn."""
        history: list[Message] = []
        before: tuple[str, int] | None = None
        for n, step in enumerate(scenario.turns, 1):
            if step.fill:
                history += self._small_talk(scenario, history)
            history.append(_user(step, scenario.picture and n == 1))
            asked = self._question(scenario, history)
            self.prompt = self.talk.render_prompt(history, scenario.thinking, asked.tools)
            replies: list[Reply] = []
            for fault in self._answered(scenario, step, n, asked, history, replies):
                yield f"turn {n}: {fault}"
            if before:
                yield from _grown(n, before, self.prompt, replies[0])
            if step.fill and replies[0].prompt_tokens < scenario.fill_tokens:
                yield f"turn {n}: expected a prompt of {scenario.fill_tokens} tokens, found {replies[0].prompt_tokens}"
            before = None if replies[0].calls else (self.prompt, replies[0].prompt_tokens)
            history.append(replies[-1].message)

    def _answered(
        self,
        scenario: Scenario,
        step: Step,
        n: int,
        asked: ChatRequest,
        history: list[Message],
        replies: list[Reply],
    ) -> Iterator[str]:
        """The answer to one question, with the calls on the way there; what was said goes into ``replies``."""
        reply = yield from self._reply(scenario, step.say, asked)
        replies.append(reply)
        if scenario.thinking and n == 1:
            self._know(
                scenario,
                n,
                "reasoning",
                step.say,
                "something",
                reply.reasoning,
                bool(reply.reasoning.strip()),
            )
        if step.calls:
            made = [Call(c.name, _arguments(c)) for c in reply.calls]
            right = _sorted(made) == _sorted(step.calls)
            self._know(scenario, n, "calls", step.say, _shown(step.calls), _shown(made), right)
            if (
                not reply.calls
            ):  # what the model does not do by itself the protocol can still ask of it
                reply = yield from self._reply(
                    scenario, step.say, self._question(scenario, history, required=True)
                )
            if reply.calls and reply.finish_reason == "tool_calls":
                history += [reply.message, *_results(step, reply.calls)]
                self.prompt = self.talk.render_prompt(history, scenario.thinking, asked.tools)
                reply = yield from self._reply(
                    scenario, _last(history), self._question(scenario, history)
                )
                replies.append(reply)
        if step.expect is not None:
            ended = reply.finish_reason == "stop"
            right = ended and re.search(step.expect, reply.answer, re.IGNORECASE) is not None
            found = reply.answer[:200] if ended else f"{reply.answer[:200]} (it does not end)"
            self._know(scenario, n, "answer", step.say, repr(step.expect), found, right)

    def _reply(
        self, scenario: Scenario, question: str, asked: ChatRequest
    ) -> Generator[str, None, Reply]:
        """One exchange, whole and, where the scenario wants it, as a stream."""
        reply = self.talk.complete(asked)
        self.said = reply.answer or _calls(reply)
        self.transcript.append(
            Exchange(
                scenario.name,
                scenario.thinking,
                question,
                reply.reasoning,
                reply.answer,
                tuple(f"{c.name}({c.arguments})" for c in reply.calls),
                reply.finish_reason,
                reply.prompt_tokens,
                reply.cached_tokens,
            )
        )
        if not scenario.beyond:
            yield from find_reply_faults(reply, asked)
        if scenario.stream:
            yield from find_stream_faults(self.talk.stream(asked), reply)
        return reply

    def _question(
        self, scenario: Scenario, history: Sequence[Message], required: bool = False
    ) -> ChatRequest:
        tools = self.tried.declared(scenario.tools)
        return ChatRequest(
            list(history),
            scenario.thinking,
            tools,
            scenario.parallel,
            required,
            scenario.schema,
            scenario.stop,
            cache_prompt=not scenario.stream,
        )

    def _small_talk(self, scenario: Scenario, history: Sequence[Message]) -> list[Message]:
        """Turns that bring the prompt to the length that the scenario wants."""
        rounds = [m for said in SMALL_TALK for m in _turn(*said)]
        here = self.talk.count_tokens(self.talk.render_prompt(history, scenario.thinking))
        each = (
            self.talk.count_tokens(self.talk.render_prompt([*history, *rounds], scenario.thinking))
            - here
        )
        return rounds * max(1, -(-(scenario.fill_tokens - here) // max(1, each)))

    def _know(
        self,
        scenario: Scenario,
        n: int,
        about: str,
        question: str,
        expected: str,
        found: str,
        right: bool,
    ) -> None:
        self.answers.append(Answer(scenario.name, n, about, question, expected, found, right))


def find_reply_faults(reply: Reply, asked: ChatRequest) -> Iterator[str]:
    """What a client would stumble over in an answer, whatever the model knows."""
    ends = ("stop", "length", "tool_calls") if asked.tools else ("stop", "length")
    if reply.finish_reason not in ends:
        yield f"expected finish_reason {' or '.join(ends)}, found {reply.finish_reason}"
    if (
        not reply.answer.strip()
        and not reply.calls
        and reply.finish_reason == "stop"
        and not asked.stop
    ):
        yield "the answer is empty"
    for leak in LEAKS:
        if leak in reply.answer:
            yield f"the answer holds the control token {leak}"
    if not asked.thinking and reply.reasoning.strip():
        yield "thinking is off, and the answer came with reasoning"
    if asked.stop and asked.stop in reply.answer:
        yield f"the answer goes on behind {asked.stop!r}, at which it had to stop"
    if reply.calls or reply.finish_reason == "tool_calls":
        yield from find_call_faults(reply, asked)
    if asked.schema is not None and reply.finish_reason == "stop":
        yield from _shape_faults(reply.answer, asked.schema)


def find_call_faults(reply: Reply, asked: ChatRequest) -> Iterator[str]:
    """What is wrong with the calls of an answer: arguments that were not cut must fit what was declared."""
    declared = {t["function"]["name"]: t["function"]["parameters"] for t in asked.tools}
    if not reply.calls:
        yield "finish_reason is tool_calls, and there is no call"
    if len(ids := [c.id for c in reply.calls]) != len(set(ids)) or not all(ids):
        yield f"expected an id of its own for each call, found {ids}"
    if not asked.parallel_calls and len(reply.calls) > 1:
        yield f"expected one call, because several were not allowed, found {len(reply.calls)}"
    for call in reply.calls:
        if call.name not in declared:
            yield f"call of {call.name!r}, which was not declared"
        elif reply.finish_reason != "length":
            yield from _argument_faults(call, declared[call.name])


def find_stream_faults(streamed: StreamedReply, whole: Reply) -> Iterator[str]:
    """Where a stream is not the whole answer in pieces."""
    parts = streamed.reply
    for what, expected, found in (
        ("reasoning", whole.reasoning, parts.reasoning),
        ("answer", whole.answer, parts.answer),
        ("calls", _calls(whole), _calls(parts)),
        ("finish_reason", whole.finish_reason, parts.finish_reason),
    ):
        if expected != found:
            yield f"stream: {what}: expected as in the whole answer {expected[:120]!r}, found {found[:120]!r}"
    ranks = [ORDER.index(kind) for kind in streamed.order]
    if ranks != sorted(set(ranks)) or not {"role", "finish", "usage"} <= set(streamed.order):
        yield f"stream: expected pieces in the order {', '.join(ORDER)}, found {', '.join(streamed.order)}"
    for call, pieces in zip(parts.calls, streamed.argument_pieces, strict=True):
        if pieces < 2 and len(call.arguments) > len("{}"):
            yield f"stream: expected the arguments of {call.name} in several pieces, found {pieces}"


def make_test_image() -> str:
    """A red square as a data URL: a PNG of its own making, so that the project carries none."""
    rows = (b"\0" + b"\xe0\x10\x10" * PICTURE_PIXELS) * PICTURE_PIXELS
    size = struct.pack(">IIBBBBB", PICTURE_PIXELS, PICTURE_PIXELS, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    return (
        "data:image/png;base64,"
        + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
    )


def _grown(n: int, before: tuple[str, int], prompt: str, reply: Reply) -> Iterator[str]:
    """Every prompt begins the next, and the server need not read it again."""
    text, tokens = before
    if not prompt.startswith(text.removesuffix(OPEN)):
        yield f"turn {n}: the prompt before is not a prefix of this one: the template rewrites the past"
    elif reply.cached_tokens < tokens - SLACK_TOKENS:
        yield f"turn {n}: expected the {tokens} tokens of the prompt before in the cache, found {reply.cached_tokens}"


def _shape_faults(answer: str, schema: Any) -> Iterator[str]:
    try:
        yield from find_schema_faults(json.loads(answer), schema, "the answer")
    except ValueError as e:
        yield f"expected JSON of the schema, found {answer[:120]!r} ({e})"


def _argument_faults(call: ToolCall, schema: Any) -> Iterator[str]:
    try:
        yield from find_schema_faults(
            json.loads(call.arguments), {"type": "object", **schema}, f"call of {call.name}"
        )
    except ValueError as e:
        yield f"call of {call.name}: expected arguments in JSON, found {call.arguments[:120]!r} ({e})"


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        found = json.loads(call.arguments)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"?": call.arguments}


def _user(step: Step, shows: bool) -> Message:
    if not shows:
        return {"role": "user", "content": step.say}
    parts = [
        {"type": "image_url", "image_url": {"url": make_test_image()}},
        {"type": "text", "text": step.say},
    ]
    return {"role": "user", "content": parts}


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _results(step: Step, made: Sequence[ToolCall]) -> list[Message]:
    """What the tools return for the calls that were made, which may be others than those that were meant."""
    texts = [step.results[n % len(step.results)] for n in range(len(made))]
    contents: list[Any] = [
        [{"type": "text", "text": text}] if step.parts else text for text in texts
    ]
    return [
        {"role": "tool", "tool_call_id": call.id, "content": content}
        for call, content in zip(made, contents, strict=True)
    ]


def _last(history: Sequence[Message]) -> str:
    """The results that stand at the end of a conversation, for the transcript."""
    contents = [m["content"] for m in history if m["role"] == "tool"]
    return "tool: " + ", ".join(c if isinstance(c, str) else c[0]["text"] for c in contents)


def _sorted(calls: Sequence[Call]) -> list[tuple[str, str]]:
    return sorted((c.name, json.dumps(c.arguments, sort_keys=True)) for c in calls)


def _shown(calls: Sequence[Call]) -> str:
    return (
        ", ".join(f"{c.name}({json.dumps(c.arguments, ensure_ascii=False)})" for c in calls)
        or "no call"
    )


def _calls(reply: Reply) -> str:
    return ", ".join(f"{c.name}({c.arguments})" for c in reply.calls)
