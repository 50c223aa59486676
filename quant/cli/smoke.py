"""The command that runs the smoke test of a file: ``quant smoke``."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from quant.core import process

if TYPE_CHECKING:
    from quant.chat.smoke import SmokeSettings
    from quant.chat.verdict import SmokeResult
    from quant.llama.model_file import ModelFile
    from quant.plan.recipe import ModelRecipe

GENERAL = "general"
"""The scenarios for a file that belongs to no model recipe and no family."""
GENERAL_MAX_ANSWER = 1024


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


@quant.command()
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
    from quant.chat import report
    from quant.chat.smoke import collect_waivers, run_smoke_test
    from quant.chat.verdict import judge_run
    from quant.llama import toolchain
    from quant.llama.model_file import ModelFile

    began = time.monotonic()
    file = ModelFile.open(options.path.resolve())
    recipe = _find_recipe(options, file)
    settings = _make_settings(options, file, recipe)
    waivers = collect_waivers(recipe.waivers if recipe else (), settings.scenarios, options.waive)
    tools = toolchain.find_toolchain(options.llama_cpp)
    with tempfile.TemporaryDirectory(prefix="quant-smoke-") as name:
        folder, reference = Path(name), None
        log = folder / report.LOG
        if options.reference:
            base = replace(settings, file=ModelFile.open(options.reference.resolve()))
            reference = run_smoke_test(base, tools, folder)
            log.unlink(missing_ok=True)
        run = run_smoke_test(settings, tools, folder)
        required = options.answers
        if required is None:
            required = _read_required_answers(options.path)
        result = judge_run(run, required, reference, waivers)
        result = replace(result, server_log=process.read_log_tail(log))
        if options.out:
            seconds = time.monotonic() - began
            _write_files(options.out, _format_files(result, seconds, log))
    if options.as_json:
        click.echo(json.dumps(result.json(), ensure_ascii=False))
    else:
        _show(result)
    raise SystemExit(0 if result.passed else 1)


def _find_recipe(options: SmokeOptions, file: "ModelFile") -> "ModelRecipe | None":
    """The recipe that was named, that the file's name or its family leads to, or None."""
    from quant.chat.families import find_file_family
    from quant.plan.load import find_model_of_file, load_model

    name = options.model or find_model_of_file(options.path.name)
    name = name or find_file_family(file.header).default_model
    return load_model(name)[0] if name else None


def _make_settings(
    options: SmokeOptions, file: "ModelFile", recipe: "ModelRecipe | None"
) -> "SmokeSettings":
    from quant.chat.scenarios import load_scenarios, merge_scenarios, select_scenarios
    from quant.chat.smoke import SmokeSettings

    has_vision = options.mmproj is not None
    if recipe:
        scenarios = merge_scenarios(recipe, options.only, has_vision=has_vision)
    else:
        scenarios = select_scenarios(load_scenarios(GENERAL), options.only, has_vision=has_vision)
    return SmokeSettings(
        file=file,
        scenarios=scenarios,
        max_answer=recipe.max_answer if recipe else GENERAL_MAX_ANSWER,
        end_tokens=recipe.ollama.stop if recipe else (),
        vision=options.mmproj.resolve() if options.mmproj else None,
        override_tensors=options.overrides,
        port=options.port,
    )


def _read_required_answers(path: Path) -> float:
    """The fraction that the recipe of the file's variant names; 1 for a file of no variant."""
    from quant.plan.load import find_variant_of_file, load_variant

    name = find_variant_of_file(path.name)
    return load_variant(name).answers if name else 1.0


def _format_files(result: "SmokeResult", seconds: float, log: Path) -> dict[str, str]:
    from quant.chat import report
    from quant.core.format import to_pretty_json

    return {
        report.TRANSCRIPT: report.format_transcript(result),
        report.JUNIT: report.format_junit(result, seconds),
        report.JSON: to_pretty_json(result.json()),
        report.LOG: log.read_text(errors="replace"),
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
