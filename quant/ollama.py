"""What Ollama reads beside a GGUF on the hub: ``params`` and the Go ``template``; checked here, because it only warns.

Pure, but for the reading of a template and the import of what renders it.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

from quant.contract import CLOSE, Ask, Rendered, Renderings
from quant.errors import InputError, nearest
from quant.recipe import RECIPES

# Ollama's api/types.go: Options and Runner.
INTEGERS = (
    "num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu",
    "num_thread", "draft_num_predict",
)  # fmt: skip
FLOATS = (
    "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
BOOLEANS = ("use_mmap",)
STRINGS = ("stop",)
"""Arrays of them; a bare string is refused."""
KEYS = (*INTEGERS, *FLOATS, *BOOLEANS, *STRINGS)


def params_problems(params: Mapping[str, Any], where: str = "params") -> Iterator[str]:
    """Every key that Ollama does not know, and every value that it does not take for its key."""
    for key, value in params.items():
        if key not in KEYS:
            yield f"{where}: {key}: Ollama knows no such parameter: {nearest(key, KEYS)}"
        elif not _fits(key, value):
            yield f"{where}: {key}: expected {_expected(key)}, found {value!r}"


def go_template(name: str) -> str | None:
    """The Go template that goes with a template patch (recipes/templates/NAME.gotmpl), for a release's ``template`` file.

    It has no tools: an Ollama that can call them prefers the Jinja in the GGUF to a template that cannot. None when the
    project has none by that name: then Ollama uses the Jinja, or what the hub makes of it.
    """
    path = RECIPES / "templates" / f"{name}.gotmpl"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def covers(ask: Ask) -> bool:
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


def render_go(template: str, asks: Sequence[Ask]) -> Renderings:
    """What a Go template makes of the prompts that it covers. Raises InputError when the renderer is not installed."""
    try:
        gotpl = import_module("gotpl")
    except ModuleNotFoundError as e:
        raise InputError("gotpl: missing; it renders Go templates: install the development group") from e
    compiled = gotpl.Template(template)
    return {ask.name: Rendered(compiled.render(_values(ask))) for ask in asks if covers(ask)}


def _values(ask: Ask) -> dict[str, Any]:
    """What Ollama gives to a template."""
    messages = [
        {"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content") or ""} for m in ask.messages
    ]
    return {"Messages": messages, "IsThinkSet": ask.thinking is not None, "Think": bool(ask.thinking)}


def _is_plain(message: Mapping[str, Any], thinking: bool | None) -> bool:
    content = message.get("content")
    if not isinstance(content, str) or message["role"] not in ("system", "user", "assistant"):
        return False
    if message["role"] == "assistant":
        return content == content.strip() and CLOSE not in content
    return message["role"] == "system" or thinking is not False or not content.endswith("/nothink")


def _fits(key: str, value: Any) -> bool:
    if key in STRINGS:
        return isinstance(value, list) and all(isinstance(v, str) and v for v in value)
    if key in BOOLEANS:
        return isinstance(value, bool)
    if isinstance(value, bool):  # which Python takes for a number
        return False
    return isinstance(value, int) if key in INTEGERS else isinstance(value, (int, float)) and abs(value) < float("inf")


def _expected(key: str) -> str:
    if key in STRINGS:
        return "an array of strings"
    if key in BOOLEANS:
        return "true or false"
    return "a whole number" if key in INTEGERS else "a number"
