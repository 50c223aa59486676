"""The command that observes what goes into the matrices of a model."""

from functools import partial
from pathlib import Path

import click

from quant.cli import progress
from quant.cli.options import FILE, absent, quant


@quant.command()
@click.argument("base", type=FILE)
@click.option(
    "--text",
    "-f",
    type=FILE,
    required=True,
    help="Calibration-side: never what files are judged by.",
)
@click.option("--out", "-o", type=FILE, required=True, help="The moments to write, as safetensors.")
@click.option("--chunks", type=click.IntRange(1), help="Of the text at most.  [all]")
@click.option(
    "--context", type=click.IntRange(32), default=512, show_default=True, help="Tokens in a chunk."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--only", metavar="REGEX", help="Only matrices whose whole name matches.  [all]")
@click.option(
    "--gradients/--no-gradients",
    default=None,
    help="Whether each token counts by its gradient behind the matrix.  [where the architecture is known]",
)
def moments(
    base: Path,
    text: Path,
    out: Path,
    chunks: int | None,
    context: int,
    threads: int,
    only: str | None,
    gradients: bool | None,
) -> None:
    """Sum, over a text, the second moments of what goes into each matrix of BASE, a GGUF in BF16.

    With gradients, the model is read forward and backward, one block at a time: what every block is given lies beside OUT
    while it works, four bytes for each number. Files that are quantised by such moments are nearer to BASE.

    A matrix with rows of n weights takes n² numbers of four bytes, in memory and on the disk, for each of its experts.
    """
    from quant.calibration.hessians import FEWEST_ROWS, HessianSettings, collect_hessians

    work = partial(
        collect_hessians,
        base,
        text,
        absent(out),
        HessianSettings(context, chunks, threads, only, gradients),
    )
    with progress.shown(1) as do:
        found = do("moments", out.name, work)
    few = sum(int((counts < FEWEST_ROWS).sum()) for counts in found.counts.values())
    if few:
        progress.say(f"{few} experts saw fewer than {FEWEST_ROWS} tokens: of them nothing is known")
    how = "each token by its gradient" if "gradients" in found.about else "all tokens alike"
    progress.say(f"{out}: {len(found.counts)} matrices, {found.about['chunks']} chunks, {how}")
