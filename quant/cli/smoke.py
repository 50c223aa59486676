"""The command that talks to a file: ``quant smoke``."""

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, FOLDER, json_option, quant, shorten, tools_option
from quant.core import process
from quant.core.format import to_pretty_json

if TYPE_CHECKING:
    from quant.chat.verdict import SmokeResult

FALLBACK = "glm-4.6"
"""The model whose conversation is held with a file of a name that no recipe has."""


@quant.command()
@click.argument("path", type=FILE)
@click.option(
    "--model", help="Whose conversation to hold.  [the one whose title begins the file's name]"
)
@click.option(
    "--reference",
    type=FILE,
    help="The BF16 file: only what it answers rightly is asked of this one.",
)
@click.option(
    "--answers",
    type=click.FloatRange(0, 1),
    help="The share of right answers needed.  [the variant's]",
)
@click.option(
    "--scenario", "only", multiple=True, metavar="NAME", help="Only this conversation; repeatable."
)
@click.option(
    "--waive",
    multiple=True,
    metavar="NAME",
    help="A failure under this name does not count; repeatable.",
)
@click.option("--mmproj", type=FILE, help="The part that sees; then it is shown a picture too.")
@click.option(
    "--override-tensor",
    "-ot",
    "moved",
    multiple=True,
    metavar="REGEX=PLACE",
    help="As llama-server's.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="A loopback port.  [a free one]")
@click.option(
    "--out",
    "-o",
    type=FOLDER,
    help="A folder for transcript.md, junit.xml, verdict.json and server.log.",
)
@json_option
@tools_option
def smoke(
    path: Path,
    model: str | None,
    reference: Path | None,
    answers: float | None,
    only: tuple[str, ...],
    waive: tuple[str, ...],
    mmproj: Path | None,
    moved: tuple[str, ...],
    port: int | None,
    out: Path | None,
    as_json: bool,
    llama_cpp: Path | None,
) -> None:
    """Talk to a GGUF (or the first shard of one) over several turns; exit 1 when it may not be published."""
    from dataclasses import replace

    from quant.chat import report
    from quant.chat.scenarios import merge_scenarios
    from quant.chat.smoke import SmokeSettings, collect_waivers, run_smoke_test
    from quant.chat.verdict import judge_run
    from quant.core import files
    from quant.llama import toolchain
    from quant.llama.model_file import ModelFile
    from quant.plan.load import find_model_of_file, load_model

    began = time.monotonic()
    recipe, _ = load_model(model or find_model_of_file(path.name) or FALLBACK)
    tried = merge_scenarios(recipe, only, sees=mmproj is not None)
    waivers = collect_waivers(recipe, tried, waive)
    tools = toolchain.find_toolchain(llama_cpp)
    vision = mmproj.resolve() if mmproj else None
    served = SmokeSettings(
        ModelFile.open(path.resolve()),
        tried,
        recipe.max_answer,
        recipe.ollama.stop,
        vision,
        moved,
        port,
    )
    with tempfile.TemporaryDirectory(prefix="quant-smoke-") as name:
        folder = Path(name)
        known = (
            run_smoke_test(replace(served, file=ModelFile.open(reference.resolve())), tools, folder)
            if reference
            else None
        )
        (folder / report.LOG).unlink(missing_ok=True)
        heard = run_smoke_test(served, tools, folder)
        share = _share_of(path) if answers is None else answers
        verdict = judge_run(heard, share, known, waivers)
        verdict = replace(verdict, log=process.read_log_tail(folder / report.LOG))
        if out:
            texts = {
                report.TRANSCRIPT: report.format_transcript(verdict),
                report.JUNIT: report.format_junit(verdict, time.monotonic() - began),
                report.JSON: to_pretty_json(verdict.json()),
                report.LOG: (folder / report.LOG).read_text(errors="replace"),
            }
            for file, text in texts.items():
                files.write_text(out / file, text)
    if as_json:
        click.echo(json.dumps(verdict.json(), ensure_ascii=False))
    else:
        _show(verdict)
    raise SystemExit(0 if verdict.passed else 1)


def _share_of(path: Path) -> float:
    """The share of right answers that the recipe of a file's variant names; all of them for a file of no variant."""
    from quant.plan.load import find_variant_of_file, load_variant

    name = find_variant_of_file(path.name)
    return load_variant(name).answers if name else 1.0


def _show(verdict: "SmokeResult") -> None:
    for exchange in verdict.transcript:
        said = exchange.answer or ", ".join(exchange.calls)
        click.echo(
            f"{'+' if exchange.thinking else '-'} {shorten(exchange.question)}\n    {shorten(said)}"
        )
    rows = []
    for s in verdict.scenarios:
        state = "passed" if s.passed else f"waived: {s.waived}" if s.waived else "FAILED"
        rows.append(
            (s.name, s.kind, state if s.detail == "ok" else f"{state}: {shorten(s.detail)}")
        )
    tables.print_table(("scenario", "kind", "verdict"), rows)
    for s in verdict.scenarios:
        if not s.passed and (s.prompt or s.answer):
            progress.print_line(f"{s.name} ({s.kind}): {s.detail}")
            for what, text in (("prompt", s.prompt), ("answer", s.answer)):
                if text:
                    progress.print_line(f"  {what}:")
                    progress.print_line("\n".join(f"    {line}" for line in text.splitlines()))
    if not verdict.passed:
        progress.print_line(f"the server's last words:\n{verdict.log}")
