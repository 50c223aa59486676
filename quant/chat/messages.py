"""Messages as clients send them, conversations of them, and placeholders for what families write.

Pure. A placeholder (``⟦open⟧``) stands for a text that differs from family to family.
"""

from dataclasses import dataclass
from typing import Any

from quant.chat.families import ReasoningFormat

Message = dict[str, Any]

# The brackets U+27E6 and U+27E7 occur in no test message and in no family's markers, so a
# placeholder is never taken for text.
OPEN, CLOSE, REASONING = "⟦open⟧", "⟦close⟧", "⟦reasoning⟧"
START, USER, ASSISTANT = "⟦start⟧", "⟦user⟧", "⟦assistant⟧"
CALL_OPEN, CALL_CLOSE = "⟦call_open⟧", "⟦call_close⟧"
RESULT_OPEN, RESULT_CLOSE = "⟦result_open⟧", "⟦result_close⟧"
OFF_SUFFIX, KEEP_VARIABLE = "⟦off_suffix⟧", "⟦keep_variable⟧"
ARGUMENTS_ERROR = "⟦arguments_error⟧"


@dataclass(frozen=True)
class Conversation:
    """One history of messages, and what is expected of its prompts beside the rules for all."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    toggled: bool = False
    """Reasoning is switched from prompt to prompt, so one prompt need not begin the next."""
    refused: str = ""
    """Part of the error with which a template must refuse it."""
    variables: tuple[tuple[str, Any], ...] = ()
    """Variables that the client passes to the template."""
    reasoning: ReasoningFormat | None = None
    """How the family writes reasoning. Clients may keep it inside ``content`` in this form."""


def user(content: Any = "Hello, who is there?") -> Message:
    """Return a question."""
    return {"role": "user", "content": content}


def assistant(content: Any, reasoning: str | None = None, **fields: Any) -> Message:
    """Return an answer; ``reasoning`` is what the client keeps apart in ``reasoning_content``."""
    apart = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": content, **fields, **apart}


def system(content: Any = "You are a terse assistant.") -> Message:
    """Return a system prompt."""
    return {"role": "system", "content": content}


def raw(content: str, reasoning: str) -> Message:
    """Return an answer whose reasoning the client left inside ``content``, as it was written."""
    return assistant(f"{OPEN}{reasoning}{CLOSE}\n{content}")


def calls(*arguments: Any, content: Any = "", name: str = "get_weather", **fields: Any) -> Message:
    """Return calls of one tool. OpenAI's API has arguments as text; templates expect an object."""
    tool_calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": a}}
        for n, a in enumerate(arguments, 1)
    ]
    return assistant(content, tool_calls=tool_calls, **fields)


def result(content: Any, call: int = 1) -> Message:
    """Return the result of a call."""
    return {"role": "tool", "tool_call_id": f"call_{call}", "content": content}


def parts(*texts: str) -> list[Message]:
    """Return content as typed parts."""
    return [{"type": "text", "text": text} for text in texts]


def tool_schema(name: str, description: str, **properties: Message) -> Message:
    """Return the declaration of a tool."""
    # Only the first property is required: a declaration has both kinds.
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }
