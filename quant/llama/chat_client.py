"""Send requests to a running llama-server: by OpenAI's client, and to its own endpoints.

The official client is used so that the smoke test meets what users meet: its parsing of streams,
of tool calls and of errors. llama-server's additions (``/health``, ``/props``, ``/tokenize``,
``/apply-template``) are described in llama.cpp's ``tools/server/README.md``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

Message = dict[str, Any]
ServerError = ValueError
"""Raised if the server refuses a request, does not answer, or answers something unusable."""


@dataclass(frozen=True)
class ChatRequest:
    """A conversation that ends with a question, and how it is to be answered."""

    messages: Sequence[Message]
    thinking: bool = False
    tools: Sequence[Message] = ()
    parallel_calls: bool = False
    tool_required: bool = False
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer."""
    stop: str | None = None
    cache_prompt: bool = True
    """False processes the whole prompt again. The same request is then the same computation, bit
    for bit; a reused prefix is computed in other batches, and rounds otherwise."""


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the model. Its arguments are unparsed text."""

    id: str
    name: str
    arguments: str

    @property
    def message(self) -> Message:
        """The call as a client sends it back."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Reply:
    """The model's reply to one request."""

    reasoning: str
    answer: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def message(self) -> Message:
        """The reply as a client sends it back."""
        message: Message = {
            "role": "assistant",
            "content": self.answer,
            "reasoning_content": self.reasoning,
        }
        return message | ({"tool_calls": [c.message for c in self.calls]} if self.calls else {})


@dataclass(frozen=True)
class StreamedReply:
    """A reply that came in chunks."""

    reply: Reply
    order: tuple[str, ...]
    """Kinds of chunks in order, each run once: role, reasoning, content, calls, finish, usage."""
    argument_pieces: tuple[int, ...]
    """Number of chunks with arguments, for each tool call."""


@dataclass(frozen=True)
class ChatClient:
    """A connection to one server."""

    client: "OpenAI"
    max_answer: int
    """Maximum number of tokens of an answer."""
    root: str
    """The server's address, under which its own endpoints lie."""

    def is_ready(self) -> bool:
        """Whether the server answers that its model is loaded."""
        from openai import OpenAIError

        try:
            self.client.get(f"{self.root}/health", cast_to=object)
        except OpenAIError:
            return False
        return True

    def read_properties(self) -> dict[str, Any]:
        """Return the server's description of its model (``/props``). Raises ServerError."""
        with _server_errors():
            return dict(_require_mapping(self.client.get(f"{self.root}/props", cast_to=object)))

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, control tokens parsed. Raises ServerError."""
        body = {"content": text, "parse_special": True, "add_special": False}
        with _server_errors():
            return len(self._post("/tokenize", body)["tokens"])

    def render_prompt(
        self, messages: Sequence[Message], thinking: bool, tools: Sequence[Message] = ()
    ) -> str:
        """Return the prompt that the server makes of a conversation. Raises ServerError."""
        return self.render_messages(messages, tools, {"enable_thinking": thinking})

    def render_history(self, messages: Sequence[Message], thinking: bool) -> str:
        """Return the same without the generation prompt. Raises ServerError."""
        variables = {"enable_thinking": thinking}
        return self.render_messages(messages, (), variables, add_generation_prompt=False)

    def render_messages(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message],
        variables: Mapping[str, Any],
        **options: Any,
    ) -> str:
        """Return the server's rendering of a conversation (``/apply-template``).

        Args:
            messages: The conversation.
            tools: Declared tools.
            variables: Passed to the template (``chat_template_kwargs``).
            options: Further fields of the request.

        Raises:
            ServerError: The template refuses the conversation, or the server does not answer.
        """
        body = {"messages": messages, "chat_template_kwargs": variables, **options}
        if tools:
            body["tools"] = tools
        with _server_errors():
            return str(self._post("/apply-template", body)["prompt"])

    def complete(self, request: ChatRequest) -> Reply:
        """Return the whole reply to a request, at temperature 0. Raises ServerError."""
        with _server_errors():
            completion = self.client.chat.completions.create(**self._create_body(request))
            choice = completion.choices[0]
            calls = tuple(
                ToolCall(c.id, c.function.name, c.function.arguments)
                for c in choice.message.tool_calls or ()
                if c.type == "function"
            )
            return Reply(
                _read_reasoning(choice.message),
                choice.message.content or "",
                calls,
                choice.finish_reason,
                completion.usage.prompt_tokens if completion.usage else 0,
                _count_cached(completion.usage),
            )

    def stream(self, request: ChatRequest) -> StreamedReply:
        """Return the reply to a request, put together from a stream. Raises ServerError."""
        with _server_errors():
            options = {"stream": True, "stream_options": {"include_usage": True}}
            body = self._create_body(request) | options
            return _gather_chunks(self.client.chat.completions.create(**body))

    def _create_body(self, request: ChatRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": "any",  # a server with one model ignores the name, but the client requires it
            "messages": list(request.messages),
            "temperature": 0,
            "max_tokens": self.max_answer,
            "extra_body": {
                "chat_template_kwargs": {"enable_thinking": request.thinking},
                "cache_prompt": request.cache_prompt,
            },
        }
        if request.tools:
            body["tools"] = list(request.tools)
            body["tool_choice"] = "required" if request.tool_required else "auto"
            body["parallel_tool_calls"] = request.parallel_calls
        if request.schema is not None:
            schema = {"name": "answer", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if request.stop:
            body["stop"] = [request.stop]
        return body

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return _require_mapping(self.client.post(f"{self.root}{path}", cast_to=object, body=body))


@contextmanager
def connect(port: int, answer_seconds: float, max_answer: int = 1) -> Iterator[ChatClient]:
    """Connect to a server on this machine while the block runs.

    Args:
        port: The server's loopback port.
        answer_seconds: Timeout of one request.
        max_answer: Maximum number of tokens of an answer.

    Yields:
        A client that does not retry: a second try would hide what a user meets.
    """
    from openai import DefaultHttpxClient, OpenAI

    root = f"http://127.0.0.1:{port}"
    # Nothing of the environment: a proxy would be asked for a loopback address, and a user's key
    # has no business here.
    with (
        DefaultHttpxClient(trust_env=False) as http,
        OpenAI(
            base_url=f"{root}/v1",
            api_key="none",
            organization="",
            project="",
            max_retries=0,
            timeout=answer_seconds,
            http_client=http,
        ) as client,
    ):
        yield ChatClient(client, max_answer, root)


@dataclass
class _ReplyBuilder:
    """A reply that is put together from the chunks of a stream."""

    reasoning: str = ""
    answer: str = ""
    finish_reason: str = ""
    usage: Any = None
    kinds: list[str] = field(default_factory=list)
    calls: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict)
    """Id, name and pieces of arguments of each call, by the index that the stream gives it."""

    def add(self, chunk: Any) -> None:
        # With include_usage the last chunk has the usage and no choices.
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
        if reasoning := _read_reasoning(delta):
            self.kinds.append("reasoning")
            self.reasoning += reasoning
        if delta.content:
            self.kinds.append("content")
            self.answer += delta.content
        for piece in delta.tool_calls or ():
            self.kinds.append("calls")
            # Id and name come with the first piece of a call only.
            start = piece.id or "", piece.function.name or ""
            # By index, because the pieces of parallel calls may alternate.
            call = self.calls.setdefault(piece.index, (*start, []))
            if piece.function.arguments:
                call[2].append(piece.function.arguments)


def _gather_chunks(chunks: Iterable[Any]) -> StreamedReply:
    builder = _ReplyBuilder()
    for chunk in chunks:
        builder.add(chunk)
    calls = [builder.calls[n] for n in sorted(builder.calls)]
    reply = Reply(
        builder.reasoning,
        builder.answer,
        tuple(ToolCall(i, name, "".join(pieces)) for i, name, pieces in calls),
        builder.finish_reason,
        builder.usage.prompt_tokens if builder.usage else 0,
        _count_cached(builder.usage),
    )
    order = tuple(kind for kind, _ in groupby(builder.kinds))
    return StreamedReply(reply, order, tuple(len(pieces) for _, _, pieces in calls))


def _read_reasoning(message: Any) -> str:
    """Return ``reasoning_content``, which llama-server adds to OpenAI's messages."""
    return str((message.model_extra or {}).get("reasoning_content") or "")


def _count_cached(usage: Any) -> int:
    details = usage.prompt_tokens_details if usage else None
    return (details.cached_tokens or 0) if details else 0


def _require_mapping(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise ServerError(f"expected a JSON object, found {str(answer)[:100]!r}")
    return answer


@contextmanager
def _server_errors() -> Iterator[None]:
    """Turn every failure of an exchange into a ServerError with the server's message."""
    from openai import APIStatusError, OpenAIError

    try:
        yield
    except APIStatusError as e:
        raise ServerError(f"HTTP {e.status_code}: {e.response.text[:500]}") from e
    except OpenAIError as e:
        raise ServerError(str(e)) from e
    # OpenAI's client does not validate what it parses: a field that the server left out shows here,
    # when it is used.
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ServerError(f"the server's answer could not be used: {e!r}") from e
