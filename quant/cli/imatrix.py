"""The commands about importance matrices: compute one, look at one, add several up, bring an old one into GGUF."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, FOLDER, json_option, quant, require_absent, tools_option

RANGE = "FIRST:COUNT"
context_option = click.option(
    "--context", type=click.IntRange(32), default=512, show_default=True, help="Tokens in a chunk."
)


class WithDefault(click.Group):
    """A group whose first word may be left out: ``quant imatrix BASE`` is ``quant imatrix compute BASE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default in front of anything that is no command of the group."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["compute", *args]
        return super().parse_args(ctx, args)


@quant.group(cls=WithDefault)
def imatrix() -> None:
    """Importance matrices: `quant imatrix BASE -o OUT` computes one.

    The command for that is `compute`, and its name may be left out.
    """


@imatrix.command()
@click.argument("base", type=FILE)
@click.option("--out", "-o", type=FILE, required=True, help="The importance matrix to write.")
@click.option(
    "--calibration",
    default="embedded",
    show_default=True,
    metavar="SET",
    help="A set's name or path.",
)
@context_option
@click.option("--chunks", type=click.IntRange(1), help="At most so many in the first pass.  [all]")
@click.option(
    "--range",
    "only",
    metavar=RANGE,
    help="Only these chunks, to be merged with those of other machines.",
)
@click.option(
    "--expert-tokens",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Draw more until all saw so many.",
)
@click.option(
    "--work", type=FOLDER, envvar="QUANT_WORK", help="Where finished ranges are kept.  [beside OUT]"
)
@tools_option
def compute(
    base: Path,
    out: Path,
    calibration: str,
    context: int,
    chunks: int | None,
    only: str | None,
    expert_tokens: int,
    work: Path | None,
    llama_cpp: Path | None,
) -> None:
    """Compute the importance matrix of BASE, a GGUF in BF16 or Q8_0, in the model's own chat format.

    A run that was interrupted continues with the range of chunks that it was at.
    """
    from quant.calibration import coverage
    from quant.calibration import imatrix as matrices
    from quant.calibration import text as calibrate
    from quant.chat.template import patch_template
    from quant.core import files
    from quant.core.store import Store
    from quant.llama import toolchain
    from quant.llama.gguf import read_header
    from quant.llama.model_file import ModelFile
    from quant.plan.recipe import ImatrixRecipe

    settings = ImatrixRecipe(calibration, context, chunks)
    settings = replace(settings, coverage=replace(settings.coverage, expert_tokens=expert_tokens))
    span = _span(only) if only else None
    require_absent(out)
    tools = toolchain.find_toolchain(llama_cpp)
    tools.require("llama-imatrix", "llama-tokenize")
    words = read_header(base).metadata.get("tokenizer.chat_template")
    template = patch_template(words, None, str(base)) if words else None
    root = (work or out.with_name(out.name + ".work")).expanduser().resolve()
    store = Store(root)
    with progress.show_progress(2) as do, store.lock():
        weights = ModelFile.open(base.resolve())
        text = do(
            "calibrate",
            calibration,
            partial(calibrate.build_set_text, settings, template, weights, tools, store),
        )
        if span:
            matrices.check_span(span, text, settings)
            with files.temp_folder(out) as folder:
                made = folder / out.name
                do(
                    "imatrix",
                    out.name,
                    partial(
                        matrices.run_llama_imatrix,
                        weights.path,
                        text.path,
                        settings,
                        tools,
                        made,
                        span,
                    ),
                )
                files.replace_atomically(made, out)
        else:
            work_of = partial(
                matrices.compute_covering_imatrix, weights, text, settings, out.name, tools, store
            )
            files.link_or_copy(do("imatrix", out.name, work_of).path, out)
    if not work:
        shutil.rmtree(root)
    matrix = matrices.read_imatrix(out)
    for line in coverage.list_undercovered(matrix.counts, max(expert_tokens, 1)):
        progress.print_line(line)
    progress.print_line(
        f"{out}: {len(matrix.counts)} matrices, {text.tokens:,} tokens of text, sha256 {matrix.receipt.sha256}"
    )


@imatrix.command()
@click.argument("matrix", type=FILE)
@click.option("--svg", type=FILE, help="Draw a heat map, layer by expert, to this file.")
@click.option(
    "--least",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Tokens that an expert should see.",
)
@json_option
def show(matrix: Path, svg: Path | None, least: int, as_json: bool) -> None:
    """How many tokens each expert of each matrix saw, and which saw too few; exit 1 when there are such."""
    from quant.calibration import coverage, imatrix_file
    from quant.core import files

    found = imatrix_file.load_imatrix(matrix)
    counts = found.counts()
    missed = list(coverage.list_undercovered(counts, least))
    if svg:
        files.write_text(
            require_absent(svg),
            coverage.draw_heat_map(counts, f"Tokens that each expert saw: {matrix.name}"),
        )
    if as_json:
        about: dict[str, Any] = {
            "file": matrix.name,
            "datasets": list(found.datasets),
            "chunks": found.chunks,
        }
        click.echo(
            json.dumps(
                about | {"tokens": {k: list(v) for k, v in counts.items()}, "missed": missed}
            )
        )
        raise SystemExit(1 if missed else 0)
    columns = (
        "layer",
        "matrices",
        ">experts",
        ">unvisited",
        ">least",
        ">1st quartile",
        ">median",
        ">3rd quartile",
        ">most",
    )
    tables.print_table(
        columns,
        coverage.make_table_rows(counts),
        title=f"{matrix.name}: tokens by expert, {found.chunks} chunks",
    )
    for line in missed:
        click.echo(line)
    if found.legacy:
        click.echo(
            "the older form (.dat) does not tell experts apart: its numbers are chunks, not tokens"
        )
    if svg:
        progress.print_line(str(svg))
    raise SystemExit(1 if missed else 0)


@imatrix.command()
@click.argument("parts", type=FILE, nargs=-1, required=True)
@click.option("--out", "-o", type=FILE, required=True, help="The importance matrix to write.")
@context_option
def merge(parts: Sequence[Path], out: Path, context: int) -> None:
    """Add PARTS up, in their order, as llama-imatrix does: ranges of one text, or several texts."""
    _merge(parts, require_absent(out), context)


@imatrix.command()
@click.argument("old", type=FILE)
@click.argument("out", type=FILE)
@context_option
def convert(old: Path, out: Path, context: int) -> None:
    """Write OLD, an importance matrix of the older form (.dat), as GGUF."""
    _merge((old,), require_absent(out), context)


def _merge(parts: Sequence[Path], out: Path, context: int) -> None:
    from quant.calibration import imatrix_file

    merged = imatrix_file.merge_imatrices((imatrix_file.load_imatrix(p) for p in parts), context)
    imatrix_file.save_imatrix(merged, out)
    progress.print_line(f"{out}: {len(merged.entries)} matrices, {merged.chunks} chunks")


def _span(told: str) -> Any:
    from quant.calibration.imatrix import Span

    first, _, count = told.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(count)):
        raise click.UsageError(f"--range: expected {RANGE} like 40:40, found {told!r}")
    return Span(int(first), int(count))
