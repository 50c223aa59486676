"""Render conversations with a template in each engine that will meet it: Jinja in a limited child, and llama-server.

The server runs on a model of some kilobytes that is made for it, which holds the template and knows nothing else: what a
server makes of a conversation depends on the template and not on the weights.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.chat.rules import Rendering, Renderings, RenderRequest
from quant.chat.sandbox import RESULTS, SandboxLimits
from quant.core import child
from quant.errors import ToolError
from quant.llama.chat_client import ChatClient, ServerError
from quant.llama.server import ServerSettings, serve_model
from quant.llama.toolchain import Toolchain

START_SECONDS = 120
AT_LIMIT = ", at its limit of time or memory"
NOT_TRIED = "chat template: not tried, because one before reached a limit"
SMALL = ("-c", "64", "-np", "1", "-t", "1", "--no-webui")
NEEDED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR")
"""Of the environment; a template's process sees no token."""
SPECIAL = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
)


@dataclass(frozen=True)
class SpecialTokens:
    """What a template may call by name."""

    bos_token: str = "[gMASK]"
    eos_token: str = "<|endoftext|>"


def render_in_sandbox(
    template: str,
    asks: Sequence[RenderRequest],
    engine: str = "jinja",
    tokens: SpecialTokens | None = None,
    limits: SandboxLimits | None = None,
) -> Renderings:
    """What Jinja makes of the asks, in a process with limits; ``engine`` is one of :data:`quant.chat.sandbox.ENGINES`.

    An ask that fails, or reaches a limit, has an error; so have those behind a limit, which were not tried.
    """
    names = vars(tokens or SpecialTokens())
    jobs = [
        {
            "name": a.name,
            "messages": as_a_server_does(a.messages),
            "tools": a.conversation.tools,
            "variables": names | a.variables,
        }
        for a in asks
    ]
    job = {
        "engine": engine,
        "template": template,
        "asks": jobs,
        "limits": asdict(limits or SandboxLimits()),
    }
    with tempfile.TemporaryDirectory(prefix="quant-render-") as name:
        folder = Path(name)
        ended = ""
        try:
            child.run_child(
                "quant.chat.sandbox", job, folder=folder, name="the renderer", env=_environment()
            )
        except ToolError as e:
            ended = e.problems[0].split("; its last words")[0]
        return _results(asks, _lines(folder / RESULTS), ended)


def hopeless(made: Renderings) -> str | None:
    """The one error to tell when nothing can be rendered, or a limit was reached; none when there is something to judge."""
    errors = [r.error for r in made.values() if r.text is None]
    if len(errors) == len(made) or any(e.startswith(NOT_TRIED) for e in errors):
        return (
            next((e for e in reversed(errors) if not e.startswith(NOT_TRIED)), errors[0])
            if errors
            else None
        )
    return None


def as_a_server_does(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a call's arguments as an object: clients send them as text, and every server decodes them first."""
    return [
        {**m, "tool_calls": [_decoded(call) for call in calls]}
        if isinstance(calls := m.get("tool_calls"), list)
        else dict(m)
        for m in messages
    ]


def render_by_server(
    template: str,
    asks: Sequence[RenderRequest],
    tools: Toolchain,
    tokens: SpecialTokens | None = None,
) -> Renderings:
    """What llama-server sends to the model for each prompt; pasts it does not render. Raises ToolError.

    Thinking on is its default: it passes that to every template, so one of the two is enough. It also tells newer
    templates to keep past reasoning, unless it is started otherwise, as here; a client can still ask for it.
    """
    prompts = [ask for ask in asks if ask.kind == "prompt" and ask.mode != "on"]
    with tempfile.TemporaryDirectory(prefix="quant-serve-") as name:
        folder = Path(name)
        write_mute_model(folder / "mute.gguf", template, tokens or SpecialTokens())
        arguments = ("-m", folder / "mute.gguf", "--jinja", "--no-reasoning-preserve", *SMALL)
        settings = ServerSettings(arguments, log=folder / "log", load_seconds=START_SECONDS)
        with serve_model(tools, settings) as server:
            return {ask.name: _served(server.client, ask) for ask in prompts}


def write_mute_model(path: Path, template: str, tokens: SpecialTokens) -> None:
    """A model of one layer and no sense, with a byte vocabulary, the tokens of GLM, and this template."""
    import numpy as np
    from gguf import GGUFWriter, TokenType

    words = _byte_letters()
    specials = [
        t
        for t in dict.fromkeys((*SPECIAL, tokens.bos_token, tokens.eos_token))
        if t and t not in words
    ]
    vocabulary, width = [*words, *specials], 32
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.NORMAL] * len(words) + [TokenType.CONTROL] * len(specials))
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    if tokens.bos_token:
        writer.add_bos_token_id(vocabulary.index(tokens.bos_token))
    if tokens.eos_token:
        writer.add_eos_token_id(vocabulary.index(tokens.eos_token))
    writer.add_chat_template(template)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {
        "token_embd": (len(vocabulary), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
    }
    shapes |= {"blk.0.ffn_norm": (width,)} | {f"blk.0.{name}": (width, width) for name in square}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _decoded(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(
        arguments := function.get("arguments"), str
    ):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except ValueError:
        return call  # a server refuses it; here the template may say what it thinks of it


def _environment() -> dict[str, str]:
    kept = {key: os.environ[key] for key in NEEDED if key in os.environ}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _lines(path: Path) -> dict[str, Rendering]:
    """What the child wrote; a line that it could not end is not there."""
    found = {}
    for line in path.read_text().split("\n")[:-1] if path.exists() else ():
        said = json.loads(line)
        found[said["name"]] = Rendering(said.get("text"), said.get("error", ""))
    return found


def _results(
    asks: Sequence[RenderRequest], found: Mapping[str, Rendering], ended: str
) -> Renderings:
    """What was rendered, and for the rest why it was not."""
    first_missing = next((a.name for a in asks if a.name not in found), "")
    last = list(found.values())[-1] if found else Rendering(None)
    results = {}
    for ask in asks:
        if ask.name in found:
            results[ask.name] = found[ask.name]
        elif ended and ask.name == first_missing:
            results[ask.name] = Rendering(
                None, f"chat template: {ended}{AT_LIMIT if 'ended by' in ended else ''}"
            )
        else:
            results[ask.name] = Rendering(None, f"{NOT_TRIED} ({ended or last.error})")
    return results


def _served(talk: ChatClient, ask: RenderRequest) -> Rendering:
    variables = {k: v for k, v in ask.variables.items() if k != "add_generation_prompt"}
    try:
        return Rendering(talk.render_messages(ask.messages, ask.conversation.tools, variables))
    except ServerError as e:
        return Rendering(None, f"llama-server: {e}")


def _byte_letters() -> list[str]:
    """The 256 letters with which byte-level vocabularies write bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in printable]
    return [chr(n) for n in printable] + [chr(256 + n) for n in range(len(others))]
