"""Which texts of a conversation a template check renders, and what an engine returned for them.

Pure. A conversation is rendered at every place where the model answers: that is a *prompt*. Where a
client stands between an answer and the next question, it is rendered without the generation prompt:
that is a *past*.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quant.chat.families import SWITCH, ReasoningFormat
from quant.chat.messages import Conversation, Message

MODES: Mapping[str, Mapping[str, Any]] = {
    # Not the same as on or off: templates ask whether the variable is defined.
    "default": {},
    "on": {SWITCH: True},
    "off": {SWITCH: False},
}
TOGGLED_MODES = ("toggled", "toggled otherwise")
"""Reasoning on at the first prompt, off at the second, and so on; and the other way round."""


@dataclass(frozen=True)
class RenderRequest:
    """One text to render."""

    conversation: Conversation
    mode: str
    kind: Literal["prompt", "past"]
    upto: int
    """Number of the conversation's messages that are rendered."""
    thinking: bool | None
    """Value of the reasoning switch; None leaves it undefined."""

    @property
    def name(self) -> str:
        """The conversation and the place in it."""
        return f"{self.conversation.name}, {self.where}"

    @property
    def where(self) -> str:
        """The place in the conversation."""
        return f"thinking {self.mode}, {self.kind} {self.upto}"

    @property
    def messages(self) -> list[Message]:
        """The messages to render."""
        return list(self.conversation.messages[: self.upto])

    @property
    def variables(self) -> dict[str, Any]:
        """The template's variables beside messages and tools."""
        thinking = {} if self.thinking is None else {SWITCH: self.thinking}
        return {
            **dict(self.conversation.variables),
            **thinking,
            "add_generation_prompt": self.kind == "prompt",
        }


@dataclass(frozen=True)
class Rendering:
    """What an engine returned for a request: a text, or the error with which it refused."""

    text: str | None
    error: str = ""


Renderings = Mapping[str, Rendering]
"""An engine's renderings, by the names of the requests."""


def list_requests(conversations: Iterable[Conversation]) -> tuple[RenderRequest, ...]:
    """Return a request for every text that the rules look at."""
    return tuple(request for c in conversations for request in conversation_requests(c))


def conversation_requests(conversation: Conversation) -> Iterator[RenderRequest]:
    """Yield the requests of one conversation: every prompt and past, in every mode of reasoning."""
    for mode in TOGGLED_MODES if conversation.toggled else MODES:
        for n, upto in enumerate(_prompt_ends(conversation)):
            yield RenderRequest(conversation, mode, "prompt", upto, _thinking(mode, n))
        if not conversation.toggled:
            for upto in _past_ends(conversation):
                yield RenderRequest(conversation, mode, "past", upto, _thinking(mode, 0))


def collect_reasoning(message: Message, reasoning: ReasoningFormat | None) -> str:
    """Return the reasoning of an answer, or ``""``.

    A client keeps it apart in ``reasoning_content``, or raw in ``content``.
    """
    if message["role"] != "assistant":
        return ""
    if isinstance(apart := message.get("reasoning_content"), str):
        return apart.strip()
    content = message.get("content")
    if not reasoning or not isinstance(content, str) or reasoning.close not in content:
        return ""
    # As GLM's template splits it. The opening marker may be missing: GLM-4.7 has it in the
    # generation prompt, so the model does not write it.
    return content.split(reasoning.close)[0].split(reasoning.open)[-1].strip()


def has_loop_reasoning(messages: Sequence[Message], reasoning: ReasoningFormat | None) -> bool:
    """Return whether a tool call after the last question has reasoning, which templates keep."""
    return any(
        m.get("tool_calls") and collect_reasoning(m, reasoning)
        for m in messages[last_question(messages) + 1 :]
    )


def last_question(messages: Sequence[Message]) -> int:
    """Return the index of the last user message, or -1."""
    return max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)


def _thinking(mode: str, n: int) -> bool | None:
    if mode in TOGGLED_MODES:
        return n % 2 == TOGGLED_MODES.index(mode)
    return MODES[mode].get(SWITCH)


def _prompt_ends(conversation: Conversation) -> list[int]:
    """Before each answer, and at the end; of a conversation that must be refused only the end."""
    messages = conversation.messages
    # An assistant message at the very start answers nothing: no prompt ends before it.
    before = [n for n, m in enumerate(messages) if n and m["role"] == "assistant"]
    return [len(messages)] if conversation.refused else [*before, len(messages)]


def _past_ends(conversation: Conversation) -> list[int]:
    """After each answer that a question follows, and at the end."""
    messages = conversation.messages
    between = [
        n
        for n in range(1, len(messages))
        if messages[n]["role"] == "user" and _is_settled(messages[:n], conversation.reasoning)
    ]
    return [] if conversation.refused else [*between, len(messages)]


def _is_settled(messages: Sequence[Message], reasoning: ReasoningFormat | None) -> bool:
    """Whether the last message is an answer that renders the same once a question follows.

    It does not where templates drop reasoning by design at the next question: reasoning kept apart,
    and all of a tool loop. Reasoning inside ``content`` must not change: that is the "past stays"
    rule.
    """
    last = messages[-1]
    return (
        last["role"] == "assistant"
        and not last.get("reasoning_content")
        and not has_loop_reasoning(messages, reasoning)
    )
