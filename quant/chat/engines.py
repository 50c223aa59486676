"""Render conversations in each engine that a template meets: Jinja in a sandbox, and llama-server.

A prompt has to be the same in all of them: llama-server has a Jinja of its own (common/jinja; minja
before), Python programs use transformers, and Ollama a Go template (:mod:`quant.chat.go_template`).
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant.chat.families import ModelFamily, SpecialTokens
from quant.chat.renderings import Rendering, Renderings, RenderRequest
from quant.chat.sandbox import RESULTS, SandboxLimits
from quant.chat.stub_model import write_stub_model
from quant.core import child
from quant.core.errors import ToolError
from quant.core.process import LOG_HEADING
from quant.llama.chat_client import ChatClient, ServerError
from quant.llama.server import ServerSettings, serve_model
from quant.llama.toolchain import Toolchain

# Chosen for a busy machine: the stub itself loads at once.
START_SECONDS = 120
AT_LIMIT = ", at its limit of time or memory"
NOT_TRIED = "chat template: not tried, because an earlier one reached a limit"
# Prompts are rendered and never evaluated, so the smallest context does.
SERVER_ARGUMENTS = ("-c", "64", "-np", "1", "-t", "1", "--no-webui")
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR")
"""Environment variables of the sandbox. A template's process sees no token."""


def render_in_sandbox(
    template: str,
    requests: Sequence[RenderRequest],
    engine: str = "jinja",
    tokens: SpecialTokens | None = None,
    limits: SandboxLimits | None = None,
) -> Renderings:
    """Return what Jinja makes of the requests, in a child process with limits.

    A limit ends the process, so the requests after the one that reached it are not tried.

    Args:
        template: The chat template; it is not trusted.
        requests: The texts to render.
        engine: ``jinja`` (this project's) or ``transformers``.
        tokens: bos and eos that the template may refer to.
        limits: Limits of the process.

    Returns:
        A rendering for each request. One that failed, or was not tried, has an error.
    """
    names = asdict(tokens or SpecialTokens())
    job = {
        "engine": engine,
        "template": template,
        "requests": [
            {
                "name": request.name,
                "messages": decode_arguments(request.messages),
                "tools": request.conversation.tools,
                "variables": names | request.variables,
            }
            for request in requests
        ],
        "limits": asdict(limits or SandboxLimits()),
    }
    with tempfile.TemporaryDirectory(prefix="quant-render-") as name:
        folder, ending = Path(name), ""
        try:
            child.run_child(
                "quant.chat.sandbox", job, folder=folder, name="the renderer", env=_environment()
            )
        except ToolError as e:
            # Without the end of the log: an error of a template is one line.
            ending = e.problems[0].partition(LOG_HEADING)[0]
        return _complete(requests, _read_renderings(folder / RESULTS), ending)


def find_fatal_error(renderings: Renderings) -> str | None:
    """Return the one error to report if nothing was rendered or a limit was reached, else None."""
    errors = [r.error for r in renderings.values() if r.text is None]
    reached_limit = any(e.startswith(NOT_TRIED) for e in errors)
    if not errors or (len(errors) < len(renderings) and not reached_limit):
        return None
    # After a limit, the last error that is not NOT_TRIED is the one that ended the process.
    return next((e for e in reversed(errors) if not e.startswith(NOT_TRIED)), errors[0])


def decode_arguments(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the arguments of calls as objects.

    Clients send them as JSON text, as OpenAI's API wants it; templates iterate over an object.
    llama-server (``func_args_not_string`` in common/chat.cpp), vLLM and SGLang decode the text
    before they render, so both engines here do too.
    """
    return [
        {**m, "tool_calls": [_decode_call(call) for call in calls]}
        if isinstance(calls := m.get("tool_calls"), list)
        else dict(m)
        for m in messages
    ]


def render_by_server(
    template: str,
    requests: Sequence[RenderRequest],
    tools: Toolchain,
    family: ModelFamily,
    tokens: SpecialTokens,
) -> Renderings:
    """Return the prompts that llama-server sends to the model. It renders no pasts.

    Raises:
        ToolError: The server cannot be started, or cannot read the template.
    """
    # llama-server passes enable_thinking=true to every template by default: "on" is the default.
    prompts = [r for r in requests if r.kind == "prompt" and r.mode != "on"]
    with tempfile.TemporaryDirectory(prefix="quant-serve-") as name:
        folder = Path(name)
        model = folder / "stub.gguf"
        write_stub_model(model, template, tokens, family.control_tokens)
        # Without this option it tells templates like GLM-4.7's to keep past reasoning, which
        # no other engine does by default. A client can still ask for it.
        arguments = ("-m", model, "--jinja", "--no-reasoning-preserve", *SERVER_ARGUMENTS)
        settings = ServerSettings(arguments, log=folder / "log", load_seconds=START_SECONDS)
        with serve_model(tools, settings) as server:
            return {request.name: _render_prompt(server.client, request) for request in prompts}


def _decode_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(
        arguments := function.get("arguments"), str
    ):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except ValueError:
        return call  # llama-server refuses the request (HTTP 500); here the template decides


def _environment() -> dict[str, str]:
    kept = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
    return kept | {
        # transformers must not ask the hub for anything while a stranger's template runs.
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _read_renderings(path: Path) -> dict[str, Rendering]:
    """What the child wrote. A line without its end is dropped: the child was killed in it."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else ()
    entries = [json.loads(line) for line in lines]
    return {e["name"]: Rendering(e.get("text"), e.get("error", "")) for e in entries}


def _complete(
    requests: Sequence[RenderRequest], rendered: Mapping[str, Rendering], ending: str
) -> Renderings:
    """The renderings, and for every request that has none the reason why.

    ``ending`` is how the child ended if it failed. Then the first request without a rendering is
    the one that it died of.
    """
    missing = [r.name for r in requests if r.name not in rendered]
    last = list(rendered.values())[-1] if rendered else Rendering(None)
    errors = dict.fromkeys(missing, f"{NOT_TRIED} ({ending or last.error})")
    if ending and missing:
        errors[missing[0]] = f"chat template: {ending}{AT_LIMIT if 'ended by' in ending else ''}"
    return {
        r.name: rendered.get(r.name) or Rendering(None, errors.get(r.name, "")) for r in requests
    }


def _render_prompt(client: ChatClient, request: RenderRequest) -> Rendering:
    # The server adds the generation prompt itself.
    variables = {k: v for k, v in request.variables.items() if k != "add_generation_prompt"}
    try:
        return Rendering(
            client.render_messages(request.messages, request.conversation.tools, variables)
        )
    except ServerError as e:
        return Rendering(None, f"llama-server: {e}")
