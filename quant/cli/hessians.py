"""The command that computes Hessians for error compensation (GPTQ)."""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from quant.cli import progress
from quant.cli.options import FILE, collect_options, quant, require_absent


@dataclass(frozen=True)
class HessiansRequest:
    """The options of `quant hessians`."""

    base: Path
    text: Path
    out: Path
    chunks: int | None
    context: int
    threads: int
    only: str | None
    gradients: bool | None


@quant.command(short_help="Compute Hessians, for error compensation.")
@click.argument("base", type=FILE)
@click.option(
    "--text",
    "-f",
    type=FILE,
    required=True,
    help="The calibration text. Never the text that files are evaluated on.",
)
@click.option("--out", "-o", type=FILE, required=True, help="The safetensors file to write.")
@click.option(
    "--chunks", type=click.IntRange(1), help="Maximum number of chunks.  [the whole text]"
)
@click.option(
    "--context", type=click.IntRange(32), default=512, show_default=True, help="Tokens in a chunk."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--only", metavar="REGEX", help="Only tensors whose full name matches.  [all]")
@click.option(
    "--gradients/--no-gradients",
    default=None,
    help="Weight each token by its gradient.  [on if the architecture is supported]",
)
@collect_options(HessiansRequest)
def hessians(request: HessiansRequest) -> None:
    """Compute the Hessian XᵀX of each weight matrix's inputs for BASE, a BF16 GGUF, over a text.

    `quant quantize --hessians` uses the file for error compensation (GPTQ): it lowers the KLD from
    BASE at the same types and sizes.

    With gradients the model runs forward and backward, one block at a time. The inputs of every
    block are kept beside OUT in the meantime, four bytes a value.

    The Hessian of a matrix with n columns has n² values of four bytes, for each of its experts. It
    is held in memory until the end, and takes as much disk.
    """
    from quant.calibration.hessian_file import FEWEST_ROWS
    from quant.calibration.hessians import HessianSettings, collect_hessians

    settings = HessianSettings(
        context=request.context,
        chunks=request.chunks,
        threads=request.threads,
        only=request.only,
        gradients=request.gradients,
    )
    out = require_absent(request.out)
    work = partial(collect_hessians, request.base, request.text, out, settings)
    with progress.show_progress(1) as run_stage:
        # The stage's name in stores and logs, older than the command's.
        result = run_stage("moments", out.name, work)
    few = sum(int((counts < FEWEST_ROWS).sum()) for counts in result.counts.values())
    if few:
        progress.print_line(
            f"{few} experts saw fewer than {FEWEST_ROWS} tokens: they have no Hessian"
        )
    weighting = "each token by its gradient" if "gradients" in result.about else "all tokens alike"
    chunks = result.about["chunks"]
    progress.print_line(f"{out}: {len(result.counts)} matrices, {chunks} chunks, {weighting}")


def _add_hidden_alias() -> None:
    """Add `quant moments`, the command's former name, which scripts may still call."""
    # A copy, because only the alias is hidden.
    alias = copy.copy(hessians)
    alias.name, alias.hidden = "moments", True
    quant.add_command(alias)


_add_hidden_alias()
