"""The command that measures files against their base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, FOLDER, collect_options, json_option, quant, tools_option
from quant.core.format import human_bytes

if TYPE_CHECKING:
    from quant.evaluate.request import Comparison
    from quant.evaluate.scores import Evaluation

# An underscore stands for a blank, and `>` for alignment to the right.
COLUMNS = "file >size domain >chunks >PPL >KLD >95_% >median >99_% >99.9_% >max >top-1"

text_option = click.option(
    "--text",
    "texts",
    type=FILE,
    multiple=True,
    help="A text to read instead of a calibration set; its file name is its domain. Repeatable.",
)
chunks_option = click.option(
    "--chunks",
    type=click.IntRange(1),
    help="Maximum number of chunks of each text.  [the whole text]",
)
threads_option = click.option("--threads", type=click.IntRange(1), default=2, show_default=True)


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of ``quant evaluate``."""

    base: Path
    paths: tuple[Path, ...]
    calibration: str
    context: int
    peers: tuple[Path, ...]
    html: Path | None
    texts: tuple[Path, ...]
    chunks: int | None
    threads: int
    work: Path | None
    llama_cpp: Path | None
    as_json: bool


@quant.command(short_help="Measure files against BF16: KLD, PPL, top-1.")
@click.argument("base", type=FILE)
@click.argument("paths", type=FILE, nargs=-1, required=True)
@click.option(
    "--calibration",
    default="embedded",
    show_default=True,
    metavar="SET",
    help="The calibration set whose held-out part is read.",
)
@click.option(
    "--context", type=click.IntRange(32), default=512, show_default=True, help="Tokens in a chunk."
)
@click.option(
    "--peer",
    "peers",
    type=FILE,
    multiple=True,
    help="A file to compare with, which charts show by another mark. Repeatable.",
)
@click.option("--html", type=FILE, help="Write a page with tables and charts; it needs no network.")
@text_option
@chunks_option
@threads_option
@click.option(
    "--work",
    type=FOLDER,
    envvar="QUANT_WORK",
    help="Where scores are kept for the next run.  [a temporary folder]",
)
@tools_option
@json_option
@collect_options(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure quantized PATHS against BASE, their BF16 file: KLD, perplexity and top-1.

    Of a split model, name the first shard. Two files are also compared with each other, chunk by
    chunk.
    """
    from quant.calibration.held_out import describe_short_kinds
    from quant.core import files
    from quant.evaluate import html
    from quant.evaluate.compare import EvaluationSettings
    from quant.evaluate.request import EvaluationRequest
    from quant.evaluate.request import evaluate_files as measure

    comparison = measure(
        EvaluationRequest(
            base=options.base,
            paths=options.paths,
            peers=options.peers,
            texts=options.texts,
            calibration_set=options.calibration,
            settings=EvaluationSettings(options.context, options.chunks, options.threads),
            work=options.work,
            llama_cpp=options.llama_cpp,
        )
    )
    if note := describe_short_kinds(comparison.too_short):
        progress.print_line(note)
    if options.html:
        files.write_text(options.html, html.render_comparison(comparison, note))
    if options.as_json:
        click.echo(json.dumps(comparison.json(), ensure_ascii=False))
    else:
        _show(comparison)


def _show(comparison: "Comparison") -> None:
    rows = [row for e in comparison.evaluations for row in _list_rows(e)]
    tables.print_table([c.replace("_", " ") for c in COLUMNS.split()], rows)
    if gap := comparison.difference:
        # The 95 % interval of the paired difference: if it contains 0, the choice of chunks alone
        # can explain the difference.
        verdict = "clearly" if gap.low > 0 or gap.high < 0 else "not clearly"
        first, second = (e.file.name for e in comparison.evaluations)
        click.echo(
            f"{second} less {first}: {gap.value:+.5f} ({gap.low:+.5f} to {gap.high:+.5f}),"
            f" {verdict} different"
        )


def _list_rows(evaluation: "Evaluation") -> "list[tuple[str, ...]]":
    """Return a row for all domains together, and one for each if there are several."""
    figures = evaluation.figures()
    # With one domain its row would repeat the first.
    domains = figures["domains"] if len(figures["domains"]) > 1 else {}
    rows: list[tuple[str, ...]] = []
    for name, f in {"all": figures, **domains}.items():
        first = name == "all"
        rows.append(
            (
                evaluation.file.name if first else "",
                human_bytes(evaluation.bytes) if first else "",
                name,
                str(f["chunks"]),
                f"{f['ppl']:.3f}",
                f"{f['kld_mean']:.5f}",
                f"{f['kld_mean_low']:.5f} - {f['kld_mean_high']:.5f}",
                f"{f['kld_median']:.5f}",
                f"{f['kld_p99']:.4f}",
                f"{f['kld_p999']:.4f}",
                f"{f['kld_max']:.3f}",
                f"{100 * f['top1']:.2f} %",
            )
        )
    return rows
