"""The commands about importance matrices: compute, show, merge, convert."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.cli import progress, tables
from quant.cli.options import (
    FILE,
    FOLDER,
    collect_options,
    json_option,
    quant,
    require_absent,
    tools_option,
)

if TYPE_CHECKING:
    from quant.calibration.imatrix import Span

RANGE = "FIRST:COUNT"
COLUMNS = (
    *("layer", "matrices", ">experts", ">unvisited", ">least"),
    *(">1st quartile", ">median", ">3rd quartile", ">most"),
)
context_option = click.option(
    "--context", type=click.IntRange(32), default=512, show_default=True, help="Tokens in a chunk."
)


class WithDefault(click.Group):
    """A group with a default command: ``quant imatrix BASE`` is ``quant imatrix compute BASE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default in front of anything that is no command of the group."""
        # A file that is called like a command needs `./` or the long form.
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["compute", *args]
        return super().parse_args(ctx, args)


@quant.group(cls=WithDefault, short_help="Compute, show or merge importance matrices.")
def imatrix() -> None:
    """Importance matrices: `quant imatrix BASE -o OUT` computes one.

    That is short for `quant imatrix compute BASE -o OUT`.
    """


@dataclass(frozen=True)
class ComputeRequest:
    """The options of `quant imatrix compute`."""

    base: Path
    out: Path
    calibration: str
    context: int
    chunks: int | None
    only: str | None
    expert_tokens: int
    work: Path | None
    llama_cpp: Path | None


@imatrix.command()
@click.argument("base", type=FILE)
@click.option("--out", "-o", type=FILE, required=True, help="The importance matrix to write.")
@click.option(
    "--calibration",
    default="embedded",
    show_default=True,
    metavar="SET",
    help="A calibration set's name or path.",
)
@context_option
@click.option(
    "--chunks",
    type=click.IntRange(1),
    help="Maximum number of chunks before coverage is checked.  [the whole text]",
)
@click.option(
    "--range",
    "only",
    metavar=RANGE,
    help="Only these chunks; merge the result with those of other machines.",
)
@click.option(
    "--expert-tokens",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Read more text until every expert saw this many tokens.",
)
@click.option(
    "--work",
    type=FOLDER,
    envvar="QUANT_WORK",
    help="The folder for finished ranges.  [beside OUT, removed at the end]",
)
@tools_option
@collect_options(ComputeRequest)
def compute(request: ComputeRequest) -> None:
    """Compute the importance matrix of BASE, a BF16 or Q8_0 GGUF, in the model's own chat format.

    Run an interrupted command again: it continues with the range of chunks that it was at.
    """
    from quant.calibration import coverage
    from quant.calibration import imatrix as matrices
    from quant.calibration.text import build_set_text
    from quant.chat.template import patch_template
    from quant.core import files
    from quant.core.store import Store
    from quant.llama import toolchain
    from quant.llama.model_file import ModelFile
    from quant.plan.recipe import ImatrixRecipe

    settings = ImatrixRecipe(request.calibration, request.context, request.chunks)
    rule = replace(settings.coverage, expert_tokens=request.expert_tokens)
    settings = replace(settings, coverage=rule)
    span = _parse_span(request.only) if request.only else None
    out = require_absent(request.out)
    tools = toolchain.find_toolchain(request.llama_cpp)
    tools.require("llama-imatrix", "llama-tokenize")
    base = ModelFile.open(request.base.resolve())
    source = base.metadata.get("tokenizer.chat_template")
    template = patch_template(source, None, str(request.base)) if source else None
    # Named after OUT, so the same command finds what an interrupted run left.
    root = (request.work or out.with_name(out.name + ".work")).expanduser().resolve()
    store = Store(root)
    with progress.show_progress(2) as run_stage, store.lock():
        build = partial(build_set_text, settings, template, base, tools, store)
        text = run_stage("calibrate", request.calibration, build)
        if span:
            # A range is one machine's part, so no text is added for coverage: only the whole shows
            # which experts lack tokens.
            matrices.check_span(span, text, settings)
            with files.temp_folder(out) as folder:
                # llama-imatrix saves while it runs (--output-frequency); OUT is complete.
                part = folder / out.name
                run = matrices.ImatrixRun(base.path, text.path, part, settings, span)
                run_stage("imatrix", out.name, partial(matrices.run_llama_imatrix, run, tools))
                files.replace_atomically(part, out)
        else:
            work = partial(
                matrices.compute_covering_imatrix, base, text, settings, out.name, tools, store
            )
            files.link_or_copy(run_stage("imatrix", out.name, work).path, out)
    if not request.work:
        # Only here: after an error or an interrupt the next run needs it.
        shutil.rmtree(root)
    matrix = matrices.read_imatrix(out)
    # --expert-tokens 0 reads no more text, but an expert without any token is still reported.
    for line in coverage.list_undercovered(matrix.counts, max(request.expert_tokens, 1)):
        progress.print_line(line)
    progress.print_line(
        f"{out}: {len(matrix.counts)} matrices, {text.tokens:,} tokens of text,"
        f" sha256 {matrix.receipt.sha256}"
    )


@imatrix.command()
@click.argument("matrix", type=FILE)
@click.option("--svg", type=FILE, help="Write a heat map, layer by expert, to this file.")
@click.option(
    "--least",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Tokens that every expert should have seen.",
)
@json_option
def show(matrix: Path, svg: Path | None, least: int, as_json: bool) -> None:
    """Show how many tokens each expert of each matrix saw. Exit 1 if one saw fewer than --least."""
    from quant.calibration import coverage, imatrix_file
    from quant.core import files

    data = imatrix_file.load_imatrix(matrix)
    counts = data.counts()
    undercovered = list(coverage.list_undercovered(counts, least))
    if svg:
        picture = coverage.draw_heat_map(counts, f"Tokens that each expert saw: {matrix.name}")
        files.write_text(require_absent(svg), picture)
    if as_json:
        document: dict[str, Any] = {
            "file": matrix.name,
            "datasets": list(data.datasets),
            "chunks": data.chunks,
            "tokens": {name: list(tokens) for name, tokens in counts.items()},
            "missed": undercovered,
        }
        click.echo(json.dumps(document))
        # Not a CheckError: the document is complete, and the exit code alone is the verdict.
        raise SystemExit(1 if undercovered else 0)
    title = f"{matrix.name}: tokens by expert, {data.chunks} chunks"
    tables.print_table(COLUMNS, coverage.make_table_rows(counts), title=title)
    for line in undercovered:
        click.echo(line)
    if data.legacy:
        # It counts chunks for a whole matrix, not tokens by expert.
        click.echo("the older form (.dat) has no counts by expert: its numbers are chunks")
    if svg:
        progress.print_line(str(svg))
    raise SystemExit(1 if undercovered else 0)


@imatrix.command()
@click.argument("parts", type=FILE, nargs=-1, required=True)
@click.option("--out", "-o", type=FILE, required=True, help="The importance matrix to write.")
@context_option
def merge(parts: Sequence[Path], out: Path, context: int) -> None:
    """Add PARTS up in their order, as llama-imatrix does: ranges of one text, or several texts."""
    _merge(parts, require_absent(out), context)


@imatrix.command()
@click.argument("old", type=FILE)
@click.argument("out", type=FILE)
@context_option
def convert(old: Path, out: Path, context: int) -> None:
    """Convert OLD, an importance matrix of the older form (.dat), to GGUF."""
    _merge((old,), require_absent(out), context)


def _merge(parts: Sequence[Path], out: Path, context: int) -> None:
    from quant.calibration import imatrix_file

    # Sums are of 32 bits, so the order of the parts decides the last bits; they are read one after
    # the other.
    merged = imatrix_file.merge_imatrices((imatrix_file.load_imatrix(p) for p in parts), context)
    imatrix_file.save_imatrix(merged, out)
    progress.print_line(f"{out}: {len(merged.entries)} matrices, {merged.chunks} chunks")


def _parse_span(text: str) -> "Span":
    """Parse FIRST:COUNT."""
    from quant.calibration.imatrix import Span

    first, _, count = text.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(count)):
        raise click.UsageError(f"--range: expected {RANGE} like 40:40, found {text!r}")
    return Span(int(first), int(count))
