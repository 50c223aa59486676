"""Talk to a file over several turns through llama-server: pass, or no release.

Two kinds of scenario. *Protocol*: the server speaks as clients expect, whatever the model knows: requests succeed, no
special token leaks into an answer, thinking is where it belongs, and every prompt is a prefix of the next. *Quality*:
answers end by themselves and are on the topic. At temperature 0, so that a verdict can be repeated.
"""

import hashlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from quant import toolchain
from quant.errors import CheckFailed, InputError, ToolError, disk_errors
from quant.header import read_headers
from quant.recipe import Model, Turn
from quant.shard import Sharded
from quant.store import Store
from quant.talk import Exchange, Talk, off_topic, protocol_faults
from quant.template import render
from quant.toolchain import Toolchain

START_SECONDS = 60
LOAD_BYTES_PER_SECOND = 50 * 10**6
"""A server that has not loaded at this pace after START_SECONDS is given up: a slow network disk reads faster."""
SECONDS_PER_TOKEN = 5
"""An answer that comes slower than this is given up: a large model on processors alone is ten times faster."""


@dataclass(frozen=True)
class Scenario:
    """One thing that was tried."""

    name: str
    kind: Literal["protocol", "quality"]
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What the smoke test found in one file."""

    file: str
    passed: bool
    scenarios: tuple[Scenario, ...]
    transcript: tuple[Exchange, ...]

    def json(self) -> dict[str, Any]:
        """The verdict as plain JSON, without the transcript."""
        return {"file": self.file, "passed": self.passed, "scenarios": [asdict(s) for s in self.scenarios]}

    @property
    def faults(self) -> tuple[str, ...]:
        """A line for every scenario that failed."""
        return tuple(f"{self.file}: {s.name}: {s.detail}" for s in self.scenarios if not s.passed)


def smoke(sharded: Sharded, model: Model, tools: Toolchain, store: Store) -> Verdict:
    """The verdict on one variant of a release; raises CheckFailed when it may not be published."""
    quality = sharded.plan.variant.smoke_quality
    inputs = {
        "files": [asdict(r) for r in sharded.receipts],
        "turns": [asdict(t) for t in model.smoke],
        "max_answer": model.max_answer,
        "quality": quality,
        "llama.cpp": str(tools.version),
    }
    first = sharded.paths[0]
    done = store.once(
        "smoke",
        inputs,
        lambda partial: _must_pass(try_file(first, model.smoke, tools, partial, quality, model.max_answer)),
    )
    return _verdict(done.facts)


def try_file(
    first: Path,
    turns: Sequence[Turn],
    tools: Toolchain,
    folder: Path,
    quality: str = "required",
    max_answer: int = 1024,
    port: int | None = None,
) -> Verdict:
    """Serve a GGUF (its first shard) on a loopback port and hold every conversation; logs go to ``folder``.

    Raises ToolError when the server does not come up, InputError when a wanted port is taken.
    """
    headers = read_headers(first)
    template = headers[0].metadata.get("tokenizer.chat_template")
    port = toolchain.free_port(port)
    log = folder / "server.log"
    arguments: list[str | Path] = [
        "-m",
        first,
        "--jinja",
        "-c",
        str(max_answer * (len(turns) + 1)),
        "-np",
        "1",
        "--seed",
        "1",
        "--no-webui",
    ]
    patience = START_SECONDS + SECONDS_PER_TOKEN * max_answer
    address = f"http://127.0.0.1:{port}"
    with (
        disk_errors(folder),
        tools.serve(arguments, port=port, cwd=folder, log=log) as server,
        httpx.Client(base_url=address, timeout=patience, trust_env=False) as http,
    ):
        talk = Talk(http, max_answer)
        _wait_until_loaded(talk, server, log, sum(h.path.stat().st_size for h in headers))
        scenarios, transcript = _converse(talk, turns, template)
    decisive = [s for s in scenarios if s.kind == "protocol" or quality == "required"]
    return Verdict(first.name, all(s.passed for s in decisive), tuple(scenarios), tuple(transcript))


def _converse(talk: Talk, turns: Sequence[Turn], template: Any) -> tuple[list[Scenario], list[Exchange]]:
    """Every conversation, thinking on and off, and what is to be said of each."""
    scenarios = [_tried("template", "protocol", _template_faults(talk, template))]
    transcript: list[Exchange] = []
    for thinking in (True, False):
        mode = f"thinking {'on' if thinking else 'off'}"
        held: list[Exchange] = []
        scenarios.append(_tried(f"{len(turns)} turns, {mode}", "protocol", _hold(talk, turns, thinking, held)))
        scenarios.append(_tried(f"answers, {mode}", "quality", off_topic(turns, held)))
        scenarios.append(_tried(f"raw history, {mode}", "protocol", _raw_history(talk, thinking, str(template))))
        transcript += held
    return scenarios, transcript


def _tried(name: str, kind: Literal["protocol", "quality"], faults: Iterator[str]) -> Scenario:
    """A scenario that passed when it yields no fault; a broken connection or answer is a fault too."""
    try:
        found = list(faults)
    except (InputError, httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as e:
        found = [f"the server's answer could not be used: {e!r}"]
    return Scenario(name, kind, not found, "; ".join(found) or "ok")


def _hold(talk: Talk, turns: Sequence[Turn], thinking: bool, held: list[Exchange]) -> Iterator[str]:
    """One conversation, turn by turn; what was said is appended to ``held``."""
    history: list[dict[str, Any]] = []
    before = ""
    for turn in turns:
        history.append({"role": "user", "content": turn.say})
        prompt = talk.prompt(history, thinking)
        if not prompt.startswith(before):
            yield f"turn {len(held) + 1}: the prompt before is not a prefix of this one: the template rewrites the past"
        before = prompt
        exchange = talk.answer(history, thinking)
        held.append(exchange)
        yield from (f"turn {len(held)}: {fault}" for fault in protocol_faults(exchange))
        history.append({"role": "assistant", "content": exchange.answer, "reasoning_content": exchange.reasoning})


def _raw_history(talk: Talk, thinking: bool, template: str) -> Iterator[str]:
    """A client that leaves ``<think>…</think>`` inside ``content``: past reasoning must not come back, nor cut the prompt."""
    said = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "<think>They greet me at some length.</think>\nHello!"},
    ]
    # Rendered here, because the server takes a last word of the assistant for the beginning of its own.
    past = render(template, said, enable_thinking=thinking)
    prompt = talk.prompt([*said, {"role": "user", "content": "And again."}], thinking)
    if "at some length" in prompt:
        yield "reasoning of an earlier turn is in the prompt of the next"
    if not prompt.startswith(past):
        yield "the conversation so far is not a prefix of the next prompt: programs that send the difference break here"


def _template_faults(talk: Talk, template: Any) -> Iterator[str]:
    served = str(talk.properties().get("chat_template"))
    if template is None:
        yield "the file holds no chat template"
    elif served.strip() != str(template).strip():
        yield f"the server uses another template than the file's (sha256 {_short(served)}, not {_short(str(template))})"


def _wait_until_loaded(talk: Talk, server: subprocess.Popen[bytes], log: Path, size: int) -> None:
    deadline = time.monotonic() + START_SECONDS + size / LOAD_BYTES_PER_SECOND
    while not talk.is_ready():
        if server.poll() is not None:
            raise ToolError(f"llama-server ended while loading; its last words:\n{toolchain.last_words(log)}")
        if time.monotonic() > deadline:
            raise ToolError(f"llama-server did not finish loading; its last words:\n{toolchain.last_words(log)}")
        time.sleep(0.05)


def _must_pass(verdict: Verdict) -> dict[str, Any]:
    if not verdict.passed:
        raise CheckFailed(*verdict.faults)
    return verdict.json() | {"transcript": [asdict(e) for e in verdict.transcript]}


def _verdict(facts: Any) -> Verdict:
    return Verdict(
        facts["file"], facts["passed"], tuple(Scenario(**s) for s in facts["scenarios"]),
        tuple(Exchange(**e) for e in facts["transcript"]),
    )  # fmt: skip


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
