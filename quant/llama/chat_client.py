"""Speak with a running llama-server as a user's program does: OpenAI's own client, and the server's own endpoints."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

Message = dict[str, Any]
ServerError = ValueError
"""What is raised when the server refuses, does not answer, or answers something else; with its words."""


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, and how it is to be answered."""

    messages: Sequence[Message]
    thinking: bool = False
    tools: Sequence[Message] = ()
    parallel: bool = False
    required: bool = False
    """A tool has to be called."""
    schema: Mapping[str, Any] | None = None
    stop: str | None = None
    cached: bool = True
    """False: the whole prompt is read anew, so that the same question is the same computation to the last bit."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made; the arguments are text until somebody reads them."""

    id: str
    name: str
    arguments: str

    @property
    def message(self) -> Message:
        """As the client sends it back."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class Reply:
    """What came back."""

    reasoning: str
    answer: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def message(self) -> Message:
        """As the client sends it back."""
        said: Message = {
            "role": "assistant",
            "content": self.answer,
            "reasoning_content": self.reasoning,
        }
        return said | ({"tool_calls": [c.message for c in self.calls]} if self.calls else {})


@dataclass(frozen=True)
class StreamedReply:
    """A reply that came in pieces."""

    reply: Reply
    order: tuple[str, ...]
    """The kinds of pieces in their order, each once in a row: role, reasoning, content, calls, finish, usage."""
    argument_pieces: tuple[int, ...]
    """In how many pieces the arguments of each call came."""


@dataclass(frozen=True)
class ChatClient:
    """A connection to one server."""

    client: "OpenAI"
    max_answer: int
    root: str
    """The server's address, under which its own endpoints lie."""

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        from openai import OpenAIError

        try:
            self.client.get(f"{self.root}/health", cast_to=object)
        except OpenAIError:
            return False
        return True

    def properties(self) -> dict[str, Any]:
        """What the server says of the model that it serves."""
        with _words():
            return dict(_mapping(self.client.get(f"{self.root}/props", cast_to=object)))

    def token_count(self, text: str) -> int:
        """How many tokens a text is, control tokens taken for what they are."""
        with _words():
            return len(
                self._post(
                    "/tokenize", {"content": text, "parse_special": True, "add_special": False}
                )["tokens"]
            )

    def prompt(
        self, messages: Sequence[Message], thinking: bool, tools: Sequence[Message] = ()
    ) -> str:
        """What the model reads before it answers: the server's own rendering."""
        return self.rendered(messages, tools, {"enable_thinking": thinking})

    def past(self, messages: Sequence[Message], thinking: bool) -> str:
        """The conversation so far, without the words that begin an answer."""
        return self.rendered(
            messages, (), {"enable_thinking": thinking}, add_generation_prompt=False
        )

    def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message],
        variables: Mapping[str, Any],
        **more: Any,
    ) -> str:
        """The same with whatever the client passes to the template, and to the server."""
        body = {"messages": messages, "chat_template_kwargs": variables, **more} | (
            {"tools": tools} if tools else {}
        )
        with _words():
            return str(self._post("/apply-template", body)["prompt"])

    def answer(self, question: Question) -> Reply:
        """The model's answer, whole, at temperature 0."""
        with _words():
            said = self.client.chat.completions.create(**self._asked(question))
            choice, usage = said.choices[0], said.usage
            message = choice.message
            calls = tuple(
                ToolCall(c.id, c.function.name, c.function.arguments)
                for c in message.tool_calls or ()
                if c.type == "function"
            )
            return Reply(
                _reasoning(message),
                message.content or "",
                calls,
                choice.finish_reason,
                usage.prompt_tokens if usage else 0,
                _cached(usage),
            )

    def stream(self, question: Question) -> StreamedReply:
        """The same as it is written, piece by piece."""
        with _words():
            asked = self._asked(question) | {
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            return _gathered(self.client.chat.completions.create(**asked))

    def _asked(self, question: Question) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": "any",
            "messages": list(question.messages),
            "temperature": 0,
            "max_tokens": self.max_answer,
            "extra_body": {
                "chat_template_kwargs": {"enable_thinking": question.thinking},
                "cache_prompt": question.cached,
            },
        }
        if question.tools:
            asked |= {
                "tools": list(question.tools),
                "tool_choice": "required" if question.required else "auto",
            }
            asked |= {"parallel_tool_calls": question.parallel}
        if question.schema is not None:
            shape = {"name": "answer", "schema": question.schema, "strict": True}
            asked |= {"response_format": {"type": "json_schema", "json_schema": shape}}
        return asked | ({"stop": [question.stop]} if question.stop else {})

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with _words():
            return _mapping(self.client.post(f"{self.root}{path}", cast_to=object, body=body))


@contextmanager
def connect(port: int, patience: float, max_answer: int = 1) -> Iterator[ChatClient]:
    """A connection to a server on this machine; an answer that takes longer than ``patience`` seconds is given up."""
    from openai import DefaultHttpxClient, OpenAI

    root = f"http://127.0.0.1:{port}"
    # Nothing of the environment: a proxy would be asked for a loopback address, and a user's key is none of our business.
    with (
        DefaultHttpxClient(trust_env=False) as http,
        OpenAI(
            base_url=f"{root}/v1",
            api_key="none",
            organization="",
            project="",
            max_retries=0,
            timeout=patience,
            http_client=http,
        ) as client,
    ):
        yield ChatClient(client, max_answer, root)


@dataclass
class _Pieces:
    """A reply that is being put together."""

    reasoning: str = ""
    answer: str = ""
    finish_reason: str = ""
    usage: Any = None
    kinds: list[str] = field(default_factory=list)
    calls: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict)

    def add(self, chunk: Any) -> None:
        """One chunk of the stream."""
        if chunk.usage:
            self.kinds.append("usage")
            self.usage = chunk.usage
        for choice in chunk.choices:
            self._add_delta(choice.delta)
            if choice.finish_reason:
                self.kinds.append("finish")
                self.finish_reason = choice.finish_reason

    def _add_delta(self, delta: Any) -> None:
        if delta.role:
            self.kinds.append("role")
        if said := _reasoning(delta):
            self.kinds.append("reasoning")
            self.reasoning += said
        if delta.content:
            self.kinds.append("content")
            self.answer += delta.content
        for piece in delta.tool_calls or ():
            self.kinds.append("calls")
            call = self.calls.setdefault(
                piece.index, (piece.id or "", piece.function.name or "", [])
            )
            if piece.function.arguments:
                call[2].append(piece.function.arguments)


def _gathered(chunks: Iterable[Any]) -> StreamedReply:
    """The reply that the chunks of a stream make."""
    pieces = _Pieces()
    for chunk in chunks:
        pieces.add(chunk)
    calls = [pieces.calls[n] for n in sorted(pieces.calls)]
    reply = Reply(
        pieces.reasoning,
        pieces.answer,
        tuple(ToolCall(i, name, "".join(parts)) for i, name, parts in calls),
        pieces.finish_reason,
        pieces.usage.prompt_tokens if pieces.usage else 0,
        _cached(pieces.usage),
    )
    order = tuple(kind for kind, _ in groupby(pieces.kinds))
    return StreamedReply(reply, order, tuple(len(parts) for _, _, parts in calls))


def _reasoning(message: Any) -> str:
    """llama-server's addition to OpenAI's messages."""
    return str((message.model_extra or {}).get("reasoning_content") or "")


def _cached(usage: Any) -> int:
    details = usage.prompt_tokens_details if usage else None
    return (details.cached_tokens or 0) if details else 0


def _mapping(said: Any) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise ServerError(f"expected a JSON object, found {str(said)[:100]!r}")
    return said


@contextmanager
def _words() -> Iterator[None]:
    """Whatever goes wrong in an exchange, as one kind of error with the server's own words."""
    from openai import APIStatusError, OpenAIError

    try:
        yield
    except APIStatusError as e:
        raise ServerError(f"HTTP {e.status_code}: {e.response.text[:500]}") from e
    except OpenAIError as e:
        raise ServerError(str(e)) from e
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ServerError(f"the server's answer could not be used: {e!r}") from e
