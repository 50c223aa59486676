"""Chat templates for Ollama, which are Go templates.

Ollama (server/images.go) prefers the Jinja in the GGUF to a Go template that has fewer
capabilities, unless ``OLLAMA_GO_TEMPLATE=1`` is set. So the Go template covers plain conversations
only, and is compared with the Jinja where it covers a conversation.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

from quant.chat.families import ReasoningFormat
from quant.chat.renderings import Rendering, Renderings, RenderRequest
from quant.core.errors import InputError
from quant.plan.load import RECIPES

PLAIN_ROLES = ("system", "user", "assistant")


def load_go_template(name: str) -> str | None:
    """Return the Go template that belongs to a template patch, for a release's ``template`` file.

    Args:
        name: The patch's name; the file is recipes/templates/NAME.gotmpl.

    Returns:
        The template, or None if there is none: then Ollama uses the Jinja, or what the hub derives.
    """
    path = RECIPES / "templates" / f"{name}.gotmpl"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def covers(request: RenderRequest) -> bool:
    """Return whether Ollama passes this conversation to a Go template unchanged.

    Covered are plain conversations with reasoning kept apart. Not covered, because the texts differ
    by design: tools; two messages of one role in a row, which Ollama merges; raw reasoning and
    blanks at the end of an answer, because a Go template cannot strip; and, with reasoning off, a
    question that ends with the family's suffix itself, because it cannot look at the end of a text.
    """
    messages = request.messages
    roles = [m["role"] for m in messages]
    return (
        request.kind == "prompt"
        and not request.conversation.tools
        and roles[-1] == "user"
        and all(a != b for a, b in pairwise(roles))
        and all(_is_plain(m, request) for m in messages)
    )


def render_go(template: str, requests: Sequence[RenderRequest]) -> Renderings:
    """Return what a Go template makes of the prompts that it covers.

    Raises:
        InputError: ``gotpl``, the renderer, is not installed.
    """
    try:
        # By name, because it is a development dependency: an installed release has no gotpl.
        gotpl = import_module("gotpl")
    except ModuleNotFoundError as e:
        raise InputError(
            "gotpl: missing; it renders Go templates: install the development group"
        ) from e
    compiled = gotpl.Template(template)
    return {r.name: Rendering(compiled.render(_template_data(r))) for r in requests if covers(r)}


def _template_data(request: RenderRequest) -> dict[str, Any]:
    """The fields that Ollama passes to a template (template/template.go)."""
    messages = [
        {"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content") or ""}
        for m in request.messages
    ]
    return {
        "Messages": messages,
        # Ollama's `think` has three states. Templates get them as two booleans.
        "IsThinkSet": request.thinking is not None,
        "Think": bool(request.thinking),
    }


def _is_plain(message: Mapping[str, Any], request: RenderRequest) -> bool:
    content, reasoning = message.get("content"), request.conversation.reasoning
    if not isinstance(content, str) or message["role"] not in PLAIN_ROLES:
        return False
    if message["role"] == "assistant":
        return content == content.strip() and not (reasoning and reasoning.close in content)
    return message["role"] == "system" or not _ends_with_suffix(content, request, reasoning)


def _ends_with_suffix(
    content: str, request: RenderRequest, reasoning: ReasoningFormat | None
) -> bool:
    suffix = reasoning.off_suffix if reasoning else ""
    return bool(suffix) and request.thinking is False and content.endswith(suffix)
