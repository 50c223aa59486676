"""The smoke test: serve a file by llama-server, run conversations, judge the answers.

The server is a real one on a loopback port, and OpenAI's own client talks to it. Everything is
asked at temperature 0, so that a result can be repeated. The record of a file is kept in the store;
the result is computed from it each time, so a variant is compared with BF16 without asking BF16
again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.chat import report
from quant.chat.conversations import CONVERSATIONS
from quant.chat.families import ModelFamily, find_file_family
from quant.chat.file_checks import FILE_CHECKS, check_file
from quant.chat.runner import SmokeRunner
from quant.chat.scenarios import Scenarios, merge_scenarios
from quant.chat.verdict import ANSWERS, SmokeResult, SmokeRun, judge_run, parse_run
from quant.core import files, process
from quant.core.errors import (
    CheckError,
    InputError,
    convert_disk_errors,
    raise_problems,
    suggest_name,
)
from quant.core.store import Store
from quant.llama.gguf import Header
from quant.llama.model_file import ModelFile
from quant.llama.server import ServerSettings, serve_model
from quant.llama.toolchain import Toolchain
from quant.plan.recipe import ModelRecipe, Waiver
from quant.plan.sizes import kv_cache_bytes

START_SECONDS = 60
LOAD_BYTES_PER_SECOND = 50 * 10**6
"""A server that loads slower after START_SECONDS is given up: a slow network disk is faster."""
SECONDS_PER_TOKEN = 5
"""An answer that comes slower is given up: a large model on a CPU alone is ten times faster."""
CHECKS = 2
"""Increase it when the checks change and the scenarios do not: stored records are made again."""
ONE_THREAD_BYTES = 10**8
"""A smaller file is served by one thread: more wait longer for each other than they compute."""
WAIVED = "waived for this run"


class SmokeTestError(CheckError):
    """A file failed its smoke test; ``result`` has the details."""

    def __init__(self, result: SmokeResult, transcript: Path) -> None:
        super().__init__(*result.faults, f"{result.file}: transcript: {transcript}")
        self.result = result


@dataclass(frozen=True)
class SmokeTestRequest:
    """The smoke test of one variant of a release."""

    file: ModelFile
    required_answers: float
    """The fraction of the reference's correct answers that must be correct."""
    reference: ModelFile
    """The BF16 file; it may be ``file`` itself."""
    model: ModelRecipe
    tools: Toolchain
    store: Store
    vision: ModelFile | None = None
    """Vision projector (mmproj)."""
    scenarios: Scenarios | None = None
    """None loads the set that the model recipe names."""

    @property
    def waivers(self) -> dict[str, str]:
        """Names of checks that may fail, and why."""
        return {w.scenario: w.why for w in self.model.waivers}

    def settings(self, file: ModelFile) -> "SmokeSettings":
        """Return how a file is served for this test."""
        return SmokeSettings(
            file=file,
            scenarios=merge_scenarios(
                self.model, has_vision=self.vision is not None, scenarios=self.scenarios
            ),
            max_answer=self.model.max_answer,
            end_tokens=self.model.ollama.stop,
            vision=self.vision.path if self.vision else None,
        )


@dataclass(frozen=True)
class SmokeSettings:
    """How a file is served and what it is asked."""

    file: ModelFile
    scenarios: Scenarios
    max_answer: int
    """Maximum number of tokens of an answer."""
    end_tokens: tuple[str, ...]
    """Tokens that must end an answer. Empty: the file's eos token will do."""
    vision: Path | None = None
    """Vision projector (mmproj)."""
    override_tensors: tuple[str, ...] = ()
    """REGEX=BUFFER for llama-server's -ot: on which device tensors are kept."""
    port: int | None = None
    """A loopback port. None takes a free one."""

    @cached_property
    def family(self) -> ModelFamily:
        """The family of the file's chat template."""
        return find_file_family(self.file.header)

    @property
    def context(self) -> int:
        """Number of tokens that the longest conversation can take.

        A turn leaves one answer in the history, and two if it calls tools: the call, and the
        answer to its result. The length of one more answer is left for questions and tools.
        """
        lengths = (
            s.fill_tokens + self.max_answer * (1 + sum(1 + bool(t.calls) for t in s.turns))
            for s in self.scenarios.scenarios
        )
        return max(lengths)

    @property
    def server_arguments(self) -> tuple[str, ...]:
        """llama-server's arguments that can change an answer.

        One slot, so that a cached prompt is never lost to another one. Without prefill an assistant
        message at the end is history, not the beginning of an answer.
        """
        fixed = f"--jinja -c {self.context} -np 1 --seed 1 --no-prefill-assistant".split()
        overrides = (part for pattern in self.override_tensors for part in ("-ot", pattern))
        return (*fixed, *overrides)


def smoke_test(request: SmokeTestRequest) -> SmokeResult:
    """Run the smoke test of one variant, and of the reference if that was not run before.

    Returns:
        The result of a variant that passed.

    Raises:
        SmokeTestError: A check failed that is not waived.
        InputError: As :func:`run_smoke_test`.
        ToolError: As :func:`run_smoke_test`.
    """
    run, folder = _run_stored(request, request.file)
    reference = None
    # BF16 itself has no reference: the fraction is then one of all known answers.
    if request.reference.receipts != request.file.receipts:
        reference, _ = _run_stored(request, request.reference)
    result = judge_run(run, request.required_answers, reference, request.waivers)
    if not result.passed:
        files.write_text(folder / report.FAILED, report.format_transcript(result))
        raise SmokeTestError(result, folder / report.FAILED)
    return result


def run_smoke_test(
    settings: SmokeSettings, tools: Toolchain, folder: Path, start_seconds: float = START_SECONDS
) -> SmokeRun:
    """Serve a file, run all checks and conversations, and return the record.

    Args:
        settings: The file and what it is asked.
        tools: llama.cpp's tools.
        folder: Where the server's log is written.
        start_seconds: Time for the server to start, beside the time to read the file.

    Raises:
        InputError: A shard is missing, the file is a later shard, or the port is taken.
        ToolError: The server does not start, or dies.
    """
    headers = settings.file.headers
    if number := headers[0].metadata.get("split.no"):
        raise InputError(
            f"{settings.file.path}: expected the first shard, by which the others are found,"
            f" found number {number + 1}"
        )
    size = sum(h.path.stat().st_size for h in headers)
    arguments: list[str | Path] = ["-m", settings.file.path, *settings.server_arguments]
    # What follows changes no answer, so it is not part of the record.
    arguments += ["--no-webui"]
    arguments += ["--mmproj", settings.vision] if settings.vision else []
    arguments += ["-t", "1"] if size < ONE_THREAD_BYTES else []
    server_settings = ServerSettings(
        arguments=tuple(arguments),
        log=folder / report.LOG,
        port=settings.port,
        load_seconds=start_seconds + size / LOAD_BYTES_PER_SECOND,
        answer_seconds=start_seconds + SECONDS_PER_TOKEN * settings.max_answer,
        max_answer=settings.max_answer,
        memory_needed=_describe_memory(size, headers[0], settings.context),
    )
    with convert_disk_errors(folder), serve_model(tools, server_settings) as server:
        runner = SmokeRunner(
            client=server.client,
            scenarios=settings.scenarios,
            family=settings.family,
            explain_failure=server.explain_failed_request,
        )
        check_file(runner, headers, settings.end_tokens)
        runner.run_all()
    return SmokeRun(
        file=settings.file.path.name,
        server_arguments=settings.server_arguments,
        checks=tuple(runner.checks),
        answers=tuple(runner.answers),
        transcript=tuple(runner.transcript),
    )


def collect_waivers(
    waivers: Sequence[Waiver], scenarios: Scenarios, names: Sequence[str] = ()
) -> dict[str, str]:
    """Return the names of the checks that may fail, and why.

    Args:
        waivers: The recipe's.
        scenarios: The scenarios that are run.
        names: Waived for this run.

    Raises:
        InputError: No check has the name of a waiver. A misspelled waiver would waive nothing.
    """
    merged = {w.scenario: w.why for w in waivers} | dict.fromkeys(names, WAIVED)
    conversations = (c.name for c in CONVERSATIONS)
    known = [*FILE_CHECKS, *(s.name for s in scenarios.scenarios), ANSWERS, *conversations]
    raise_problems(
        f"waiver {name!r}: no scenario of that name: {suggest_name(name, known)}"
        for name in merged
        if name not in known
    )
    return merged


def _run_stored(request: SmokeTestRequest, file: ModelFile) -> tuple[SmokeRun, Path]:
    """The record of a file, made now or before, and the folder with its transcript.

    A record whose protocol checks fail is not kept: it may have been the machine.
    """
    settings, waivers = request.settings(file), request.waivers
    # The server's arguments follow from these: the context from scenarios and max_answer.
    inputs = {
        "checks": CHECKS,
        "files": [asdict(r) for r in file.receipts],
        "vision": request.vision.digest if request.vision else None,
        "scenarios": asdict(settings.scenarios),
        "family": asdict(settings.family),
        "max_answer": settings.max_answer,
        "ends": settings.end_tokens,
        "llama.cpp": str(request.tools.version),
    }

    def run(partial: Path) -> dict[str, Any]:
        record = run_smoke_test(settings, request.tools, partial)
        # No answers are required here: the record serves variants with different requirements.
        result = judge_run(record, 0, None, waivers)
        result = replace(result, server_log=process.read_log_tail(partial / report.LOG))
        files.write_text(partial / report.TRANSCRIPT, report.format_transcript(result))
        if not result.passed:
            raise SmokeTestError(result, partial / report.TRANSCRIPT)
        return record.json()

    stored = request.store.run_once("smoke", inputs, run)
    return parse_run(stored.facts), stored.folder


def _describe_memory(size: int, header: Header, context: int) -> str:
    """What a server needs memory for: the weights, and the KV cache of that many tokens."""
    cache = kv_cache_bytes(header, context)
    return (
        f"weights of {size / 1e9:.2f} GB and a cache of {cache / 1e9:.2f} GB for {context} tokens"
    )
