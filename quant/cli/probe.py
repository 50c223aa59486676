"""The command that measures how sensitive a model is to quantization, on one machine or several."""

from dataclasses import dataclass
from pathlib import Path

import click

from quant.cli import progress
from quant.cli.evaluate import threads_option
from quant.cli.options import FILE, FOLDER, collect_options, hessians_option, quant, tools_option


@dataclass(frozen=True)
class ProbeOptions:
    """The options of ``quant probe``."""

    base: Path
    matrix: Path | None
    errors: Path | None
    hessians: Path | None
    text: Path
    chunks: int | None
    threads: int
    cheap: bool
    part: str | None
    parts: tuple[Path, ...]
    forecast_only: bool
    out: Path
    work: Path | None
    llama_cpp: Path | None


@quant.command(short_help="Measure sensitivities, for allocate.")
@click.argument("base", type=FILE)
@click.option("--imatrix", "matrix", type=FILE, help="Importance matrix of BASE.")
@click.option(
    "--errors",
    type=FILE,
    help="Error table; measured and written if the file does not exist.  [in --work]",
)
@hessians_option
@click.option(
    "--text",
    type=FILE,
    required=True,
    help="Text from the calibration side; never one that files are judged by.",
)
@click.option(
    "--chunks", type=click.IntRange(1), help="Maximum number of chunks.  [the whole text]"
)
@threads_option
@click.option(
    "--cheap", is_flag=True, help="About forty probes, for models of hundreds of gigabytes."
)
@click.option(
    "--part", metavar="I/N", help="Only every Nth probe from the Ith on: for one of N machines."
)
@click.option(
    "--merge",
    "parts",
    type=FILE,
    multiple=True,
    help="Probes that another machine measured. Repeatable.",
)
@click.option(
    "--forecast", "forecast_only", is_flag=True, help="Print what measuring would take, and stop."
)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="The sensitivities, as JSON.",
)
@click.option(
    "--work",
    type=FOLDER,
    envvar="QUANT_WORK",
    help="Where probes are kept, to continue from.  [OUT.work]",
)
@tools_option
@collect_options(ProbeOptions)
def probe(options: ProbeOptions) -> None:
    """Measure the sensitivities of BASE, for `quant allocate --sensitivity`.

    An interrupted run continues. Several machines share the probes: each takes a --part, and one of
    them, or a last one, takes --merge of what the others wrote.
    """
    from quant.evaluate.sensitivity_measurement import SensitivityRequest, measure_sensitivities
    from quant.plan.sensitivity import write_sensitivities

    request = SensitivityRequest(
        base=options.base,
        text=options.text,
        imatrix=options.matrix,
        errors=options.errors,
        hessians=options.hessians,
        chunks=options.chunks,
        threads=options.threads,
        cheap=options.cheap,
        part=options.part,
        merge=options.parts,
        # Kept after the run: the next call measures only what is missing.
        work=options.work or options.out.with_name(f"{options.out.name}.work"),
        llama_cpp=options.llama_cpp,
    )
    with progress.show_log():
        sensitivities = measure_sensitivities(request, forecast_only=options.forecast_only)
    # None after --forecast, which has only logged.
    if sensitivities:
        write_sensitivities(options.out, sensitivities)
        note = "; a part, to be merged" if options.part else ""
        progress.print_line(f"{options.out}: {sensitivities.source}{note}")
