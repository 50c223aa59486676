"""Talk to a file over several turns through llama-server: pass, or no release.

The server is a real one on a loopback port, and what is said to it is said by OpenAI's own client. At temperature 0, so
that a verdict can be repeated. What a file said is kept in the store; the verdict is worked out from it anew each time,
so a variant is held against the BF16 file without asking that one again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quant.chat import report
from quant.chat.conversations import BATTERY
from quant.chat.runner import SmokeRunner
from quant.chat.scenarios import Scenarios, merge_scenarios
from quant.chat.verdict import ANSWERS, SmokeResult, SmokeRun, judge_run, parse_run
from quant.core import files, process
from quant.core.format import hash_text
from quant.core.store import Store
from quant.errors import (
    CheckError,
    InputError,
    convert_disk_errors,
    raise_problems,
    suggest_name,
)
from quant.llama.chat_client import ChatClient, Message
from quant.llama.gguf import Header
from quant.llama.model_file import ModelFile
from quant.llama.server import ServerSettings, serve_model
from quant.llama.toolchain import Toolchain
from quant.plan.recipe import ModelRecipe
from quant.plan.sizes import kv_cache_bytes

START_SECONDS = 60
LOAD_BYTES_PER_SECOND = 50 * 10**6
"""A server that has not loaded at this pace after START_SECONDS is given up: a slow network disk reads faster."""
SECONDS_PER_TOKEN = 5
"""An answer that comes slower than this is given up: a large model on processors alone is ten times faster."""
CHECKS = 1
"""Counts up when what is checked changes in a way that the scenarios do not show; kept work is then done again."""
ENDS = ("eos", "eot", "eom")
"""The file's keys for the tokens that end an answer: tokenizer.ggml.eos_token_id and so on."""
WINDOW_BYTES = 2**16
SMALL_BYTES = 10**8
"""Of a smaller file one thread is enough: more wait longer for each other than they work, above all on a busy machine."""
FILE_CHECKS = (
    "template",
    "generation prompt",
    "special tokens",
    "end of turn",
    "tool format",
    "weights",
    "raw history, thinking on",
    "raw history, thinking off",
)
"""What is looked at before the conversations."""
WAIVED = "waived for this run"


class SmokeTestError(CheckError):
    """A file did not pass; the verdict is kept for who wants to show it."""

    def __init__(self, verdict: SmokeResult, transcript: Path) -> None:
        super().__init__(*verdict.faults, f"{verdict.file}: what was said: {transcript}")
        self.verdict = verdict


@dataclass(frozen=True)
class SmokeSettings:
    """How a file is served for a smoke test."""

    file: ModelFile
    tried: Scenarios
    max_answer: int
    ends: tuple[str, ...]
    """Tokens that must end an answer."""
    vision: Path | None = None
    """The part that sees (mmproj)."""
    override_tensors: tuple[str, ...] = ()
    """As llama-server's -ot: where some tensors are kept."""
    port: int | None = None

    @property
    def context(self) -> int:
        """Tokens that the longest conversation can take."""
        turns = (
            s.fill_tokens + self.max_answer * (1 + sum(1 + bool(t.calls) for t in s.turns))
            for s in self.tried.scenarios
        )
        return max(turns)

    @property
    def server(self) -> tuple[str, ...]:
        """The server's arguments that can change what is said."""
        moved = (part for pattern in self.override_tensors for part in ("-ot", pattern))
        return (
            "--jinja",
            "-c",
            str(self.context),
            "-np",
            "1",
            "--seed",
            "1",
            "--no-prefill-assistant",
            *moved,
        )


def smoke_test(
    file: ModelFile,
    answers: float,
    original: ModelFile,
    model: ModelRecipe,
    tools: Toolchain,
    store: Store,
    vision: ModelFile | None = None,
    scenarios: Scenarios | None = None,
) -> SmokeResult:
    """The verdict on one variant of a release; raises SmokeFailed when it may not be published."""
    tried = merge_scenarios(model, sees=vision is not None, found=scenarios)
    waivers = {w.scenario: w.why for w in model.waivers}
    heard, folder = _kept(file, model, tools, store, vision, waivers, tried)
    reference = None
    if original.receipts != file.receipts:
        reference, _ = _kept(original, model, tools, store, vision, waivers, tried)
    verdict = judge_run(heard, answers, reference, waivers)
    if not verdict.passed:
        files.write_text(folder / report.FAILED, report.format_transcript(verdict))
        raise SmokeTestError(verdict, folder / report.FAILED)
    return verdict


def _kept(
    file: ModelFile,
    model: ModelRecipe,
    tools: Toolchain,
    store: Store,
    vision: ModelFile | None,
    waivers: Mapping[str, str],
    tried: Scenarios,
) -> tuple[SmokeRun, Path]:
    """What a file says, asked now or found, and the folder with its transcript.

    Raises SmokeFailed when the protocol does not hold: that is not kept, because it may have been the machine.
    """
    served = SmokeSettings(
        file,
        tried,
        model.max_answer,
        model.ollama.stop,
        vision.path if vision else None,
    )
    inputs = {
        "checks": CHECKS,
        "files": [asdict(r) for r in file.receipts],
        "vision": vision.digest if vision else None,
        "scenarios": asdict(served.tried),
        "max_answer": model.max_answer,
        "ends": model.ollama.stop,
        "llama.cpp": str(tools.version),
    }

    def ask(partial: Path) -> dict[str, Any]:
        heard = run_smoke_test(served, tools, partial)
        verdict = replace(
            judge_run(heard, 0, None, waivers), log=process.read_log_tail(partial / report.LOG)
        )
        files.write_text(partial / report.TRANSCRIPT, report.format_transcript(verdict))
        if not verdict.passed:
            raise SmokeTestError(verdict, partial / report.TRANSCRIPT)
        return heard.json()

    done = store.run_once("smoke", inputs, ask)
    return parse_run(done.facts), done.folder


def run_smoke_test(
    served: SmokeSettings, tools: Toolchain, folder: Path, start_seconds: float = START_SECONDS
) -> SmokeRun:
    """Serve a GGUF (its first shard) and hold every conversation with it; the server's log goes to ``folder``.

    Raises ToolError when the server does not come up or dies, InputError for a shard that is missing or a port in use.
    """
    headers = served.file.headers
    if number := headers[0].metadata.get("split.no"):
        raise InputError(
            f"{served.file.path}: expected the first shard, which finds the others, found number {number + 1}"
        )
    size = sum(h.path.stat().st_size for h in headers)
    arguments: list[str | Path] = ["-m", served.file.path, *served.server, "--no-webui"]
    arguments += ["--mmproj", served.vision] if served.vision else []
    arguments += ["-t", "1"] if size < SMALL_BYTES else []
    settings = ServerSettings(
        arguments=tuple(arguments),
        log=folder / report.LOG,
        port=served.port,
        load_seconds=start_seconds + size / LOAD_BYTES_PER_SECOND,
        answer_seconds=start_seconds + SECONDS_PER_TOKEN * served.max_answer,
        max_answer=served.max_answer,
        memory_needed=_describe_memory(size, headers[0], served.context),
    )
    with convert_disk_errors(folder), serve_model(tools, settings) as server:
        holding = SmokeRunner(server.client, served.tried, server.explain_failed_request)
        _hold_the_file(holding, headers, served)
        holding.all()
    return SmokeRun(
        served.file.path.name,
        served.server,
        tuple(holding.outcomes),
        tuple(holding.answers),
        tuple(holding.transcript),
    )


def _hold_the_file(holding: SmokeRunner, headers: Sequence[Header], served: SmokeSettings) -> None:
    """What can be said of a file before anything is said to it."""
    talk, tokens = holding.talk, served.tried.tokens
    holding.note(
        "template", _template_faults(talk, headers[0].metadata.get("tokenizer.chat_template"))
    )
    holding.note("generation prompt", _generation_faults(talk))
    holding.note("special tokens", _split_tokens(talk, tokens.single))
    holding.note("end of turn", _end_faults(headers[0], served.ends))
    holding.note("tool format", _format_faults(holding, tokens.call))
    holding.note("weights", (fault for header in headers for fault in find_zero_tensors(header)))
    for thinking in (True, False):
        holding.note(
            f"raw history, thinking {'on' if thinking else 'off'}", _raw_history(holding, thinking)
        )


def _template_faults(talk: ChatClient, template: Any) -> Iterator[str]:
    """The server tells the template that it uses; another one would be llama.cpp's own guess."""
    served = str(talk.read_properties().get("chat_template"))
    if template is None:
        yield "the file holds no chat template"
    elif served.strip() != str(template).strip():
        yield (
            f"the server uses another template than the file's (sha256 {hash_text(served)[:12]},"
            f" not {hash_text(str(template))[:12]})"
        )


def _generation_faults(talk: ChatClient) -> Iterator[str]:
    said: list[Message] = [{"role": "user", "content": "Hello."}]
    prompt, past = talk.render_prompt(said, True), talk.render_history(said, True)
    if prompt == past or not prompt.startswith(past):
        yield f"nothing behind the question asks the model for its answer: the prompt ends with {prompt[-40:]!r}"


def _split_tokens(talk: ChatClient, singles: Sequence[str]) -> Iterator[str]:
    for token in singles:
        if (count := talk.count_tokens(token)) != 1:
            yield f"{token}: expected one token of the vocabulary, found {count} pieces"


def _end_faults(header: Header, ends: Sequence[str]) -> Iterator[str]:
    """A file that does not say where an answer ends lets the model talk on for both sides."""
    words = header.metadata.get("tokenizer.ggml.tokens") or []
    found = {}
    for kind in ENDS:
        number = header.metadata.get(key := f"tokenizer.ggml.{kind}_token_id")
        if isinstance(number, int) and 0 <= number < len(words):
            found[key] = words[number]
    if (key := "tokenizer.ggml.eos_token_id") not in found:
        yield f"{key}: missing, or no token of the vocabulary; expected one of {', '.join(ends)}"
    elif found[key] not in ends:
        yield f"{key}: expected one of {', '.join(ends)}, found {found[key]}"
    if missing := [end for end in ends if end not in found.values()]:
        yield f"expected {', '.join(missing)} to end an answer too, found {', '.join(found.values()) or 'none'}"


def _format_faults(holding: SmokeRunner, marks: Sequence[str]) -> Iterator[str]:
    """A template of another family writes calls in a way that the model was not taught."""
    if not marks or not holding.tried.tools:
        return
    tool = holding.tried.tools[0]
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": tool.name, "arguments": '{"key": "value"}'},
    }
    said: list[Message] = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "a result"},
    ]
    holding.prompt = holding.talk.render_prompt(said, True, [tool.declared])
    written = holding.prompt.partition("Hello.")[2]
    if missing := [mark for mark in (*marks, tool.name, "a result") if mark not in written]:
        yield f"expected a call and its result to be written with {', '.join(missing)}, found {written[:200]!r}"


def _raw_history(holding: SmokeRunner, thinking: bool) -> Iterator[str]:
    """A client that leaves ``<think>…</think>`` inside ``content``: past reasoning must not come back, nor cut the prompt."""
    said: list[Message] = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "<think>They greet me at some length.</think>\nHello!"},
    ]
    past = holding.talk.render_history(said, thinking)
    holding.prompt = prompt = holding.talk.render_prompt(
        [*said, {"role": "user", "content": "And again."}], thinking
    )
    if "at some length" in prompt:
        yield "reasoning of an earlier turn is in the prompt of the next"
    if not prompt.startswith(past):
        yield "the conversation so far is not a prefix of the next prompt: programs that send the difference break here"


def find_zero_tensors(header: Header) -> Iterator[str]:
    """Every weight of a file that is nothing but zeros: no trained model has one, so something was lost on the way.

    Looks at the beginning, the middle and the end of each tensor, and reads all of it only where those are zero.
    """
    with header.path.open("rb") as f:

        def zero(start: int, length: int) -> bool:
            f.seek(header.data_start + start)
            return not any(f.read(length))

        for t in header.tensors:
            if not t.name.endswith(".weight") or not t.bytes:
                continue
            last = max(0, t.bytes - WINDOW_BYTES)
            if all(
                zero(t.offset + at, min(WINDOW_BYTES, t.bytes - at)) for at in (0, last // 2, last)
            ) and all(
                zero(t.offset + at, min(WINDOW_BYTES, t.bytes - at))
                for at in range(0, t.bytes, WINDOW_BYTES)
            ):
                yield f"tensor {t.name}: expected weights, found {t.bytes} bytes of zero"


def _describe_memory(size: int, header: Header, context: int) -> str:
    """What a server needs memory for: the weights, and the cache of that many tokens."""
    cache = kv_cache_bytes(header, context)
    return (
        f"weights of {size / 1e9:.2f} GB and a cache of {cache / 1e9:.2f} GB for {context} tokens"
    )


def collect_waivers(
    model: ModelRecipe, tried: Scenarios, named: Sequence[str] = ()
) -> dict[str, str]:
    """The failures that do not count, and why: the recipe's, and those that were named for this run.

    Raises InputError for a name under which nothing can fail: a misspelt waiver would be none.
    """
    found = {w.scenario: w.why for w in model.waivers} | dict.fromkeys(named, WAIVED)
    names = [*FILE_CHECKS, *(s.name for s in tried.scenarios), ANSWERS, *(c.name for c in BATTERY)]
    raise_problems(
        f"waiver {n!r}: no scenario of that name: {suggest_name(n, names)}"
        for n in found
        if n not in names
    )
    return found
