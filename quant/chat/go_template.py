"""Chat templates for Ollama, which are Go templates."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

from quant.chat.rules import CLOSE, Rendering, Renderings, RenderRequest
from quant.errors import InputError
from quant.plan.load import RECIPES


def load_go_template(name: str) -> str | None:
    """The Go template that goes with a template patch (recipes/templates/NAME.gotmpl), for a release's ``template`` file.

    It has no tools: an Ollama that can call them prefers the Jinja in the GGUF to a template that cannot. None when the
    project has none by that name: then Ollama uses the Jinja, or what the hub makes of it.
    """
    path = RECIPES / "templates" / f"{name}.gotmpl"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def covers(ask: RenderRequest) -> bool:
    """Whether Ollama would hand these words to a Go template as they are: plain talk, thinking apart, no tools.

    It merges messages of one role that follow each other, and a Go template can neither strip blanks nor look at the end
    of a text, so a question that ends with /nothink itself is not covered with thinking off.
    """
    messages = ask.messages
    roles = [m["role"] for m in messages]
    return (
        ask.kind == "prompt"
        and not ask.conversation.tools
        and roles[-1] == "user"
        and all(a != b for a, b in pairwise(roles))
        and all(_is_plain(m, ask.thinking) for m in messages)
    )


def render_go(template: str, asks: Sequence[RenderRequest]) -> Renderings:
    """What a Go template makes of the prompts that it covers. Raises InputError when the renderer is not installed."""
    try:
        gotpl = import_module("gotpl")
    except ModuleNotFoundError as e:
        raise InputError(
            "gotpl: missing; it renders Go templates: install the development group"
        ) from e
    compiled = gotpl.Template(template)
    return {ask.name: Rendering(compiled.render(_values(ask))) for ask in asks if covers(ask)}


def _values(ask: RenderRequest) -> dict[str, Any]:
    """What Ollama gives to a template."""
    messages = [
        {"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content") or ""}
        for m in ask.messages
    ]
    return {
        "Messages": messages,
        "IsThinkSet": ask.thinking is not None,
        "Think": bool(ask.thinking),
    }


def _is_plain(message: Mapping[str, Any], thinking: bool | None) -> bool:
    content = message.get("content")
    if not isinstance(content, str) or message["role"] not in ("system", "user", "assistant"):
        return False
    if message["role"] == "assistant":
        return content == content.strip() and CLOSE not in content
    return message["role"] == "system" or thinking is not False or not content.endswith("/nothink")
