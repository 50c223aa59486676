"""The command that runs the smoke test of a file: ``quant smoke``."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.cli import progress, tables
from quant.cli.options import (
    FILE,
    FOLDER,
    collect_options,
    json_option,
    quant,
    shorten,
    tools_option,
)

if TYPE_CHECKING:
    from quant.chat.verdict import SmokeResult


@dataclass(frozen=True)
class SmokeOptions:
    """The options of ``quant smoke``."""

    path: Path
    model: str | None
    reference: Path | None
    answers: float | None
    only: tuple[str, ...]
    waive: tuple[str, ...]
    mmproj: Path | None
    overrides: tuple[str, ...]
    port: int | None
    out: Path | None
    as_json: bool
    llama_cpp: Path | None


@quant.command(short_help="Run conversations with a file.")
@click.argument("path", type=FILE)
@click.option(
    "--model",
    help="Model recipe whose conversation is run.  [the one whose title begins the file's name]",
)
@click.option(
    "--reference",
    type=FILE,
    help="The BF16 file: only answers that it gives correctly are required.",
)
@click.option(
    "--answers",
    type=click.FloatRange(0, 1),
    help="Fraction of correct answers that is required.  [the variant recipe's]",
)
@click.option(
    "--scenario", "only", multiple=True, metavar="NAME", help="Run only this scenario; repeatable."
)
@click.option(
    "--waive",
    multiple=True,
    metavar="NAME",
    help="A failure of this check does not count; repeatable.",
)
@click.option("--mmproj", type=FILE, help="Vision projector (mmproj); adds the image scenario.")
@click.option(
    "--override-tensor",
    "-ot",
    "overrides",
    multiple=True,
    metavar="REGEX=BUFFER",
    help="Passed to llama-server: the device that tensors are kept on; repeatable.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Loopback port.  [a free one]")
@click.option(
    "--out",
    "-o",
    type=FOLDER,
    help="Folder for transcript.md, junit.xml, verdict.json and server.log.",
)
@json_option
@tools_option
@collect_options(SmokeOptions)
def smoke(options: SmokeOptions) -> None:
    """Run multi-turn conversations with a GGUF (or the first shard of one) through llama-server.

    Exits with 1 if the file may not be published.
    """
    from quant.chat.standalone import SmokeFileRequest, smoke_test_file

    began = time.monotonic()
    outcome = smoke_test_file(
        SmokeFileRequest(
            path=options.path,
            model=options.model,
            reference=options.reference,
            required_answers=options.answers,
            scenarios=options.only,
            waivers=options.waive,
            mmproj=options.mmproj,
            override_tensors=options.overrides,
            port=options.port,
            llama_cpp=options.llama_cpp,
        )
    )
    result = outcome.result
    if options.out:
        # Also of a file that failed; that is when they are read.
        texts = _format_files(result, time.monotonic() - began, outcome.server_log)
        _write_files(options.out, texts)
    if options.as_json:
        click.echo(json.dumps(result.json(), ensure_ascii=False))
    else:
        _show(result)
    # Not a CheckError: the table lists what failed, and --json must stay one document.
    raise SystemExit(0 if result.passed else 1)


def _format_files(result: "SmokeResult", seconds: float, log: str) -> dict[str, str]:
    from quant.chat import report
    from quant.core.format import to_pretty_json

    return {
        report.TRANSCRIPT: report.format_transcript(result),
        report.JUNIT: report.format_junit(result, seconds),
        report.JSON: to_pretty_json(result.json()),
        report.LOG: log,
    }


def _write_files(folder: Path, texts: Mapping[str, str]) -> None:
    from quant.core import files

    for name, text in texts.items():
        files.write_text(folder / name, text)


def _show(result: "SmokeResult") -> None:
    for exchange in result.transcript:
        answer = exchange.answer or ", ".join(exchange.calls)
        mode = "+" if exchange.thinking else "-"
        click.echo(f"{mode} {shorten(exchange.question)}\n    {shorten(answer)}")
    rows = []
    for s in result.scenarios:
        # A waived check still failed; the table shows why it does not count.
        state = "passed" if s.passed else f"waived: {s.waived}" if s.waived else "FAILED"
        rows.append(
            (s.name, s.kind, state if s.detail == "ok" else f"{state}: {shorten(s.detail)}")
        )
    tables.print_table(("scenario", "kind", "verdict"), rows)
    for s in result.scenarios:
        if not s.passed and (s.prompt or s.answer):
            progress.print_line(f"{s.name} ({s.kind}): {s.detail}")
            for what, text in (("prompt", s.prompt), ("answer", s.answer)):
                if text:
                    progress.print_line(f"  {what}:")
                    progress.print_line("\n".join(f"    {line}" for line in text.splitlines()))
    if not result.passed:
        progress.print_line(f"end of the server's log:\n{result.server_log}")
