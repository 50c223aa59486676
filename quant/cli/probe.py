"""The command that measures how much each part of a model matters, alone or shared among machines."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.cli import progress
from quant.cli.options import FILE, FOLDER, hessians_option, quant, tools_option
from quant.errors import InputError

if TYPE_CHECKING:
    from quant.evaluate.probe import ProbeSettings
    from quant.plan.error_table import ErrorTable
    from quant.plan.sensitivity import Probe, ProbeResult


@quant.command()
@click.argument("base", type=FILE)
@click.option("--imatrix", "matrix", type=FILE, help="The importance matrix of BASE.")
@click.option(
    "--errors", type=FILE, help="An error database; written there if it is not there.  [in --work]"
)
@hessians_option
@click.option(
    "--text", type=FILE, required=True, help="Calibration-side: never what files are judged by."
)
@click.option("--chunks", type=click.IntRange(1), help="Of the text at most.  [all]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--cheap", is_flag=True, help="About forty probes, for models of hundreds of gigabytes."
)
@click.option(
    "--part", metavar="I/N", help="Only every Nth probe from the Ith on: the share of one machine."
)
@click.option(
    "--merge",
    "parts",
    type=FILE,
    multiple=True,
    help="Probes that were measured elsewhere; repeatable.",
)
@click.option("--forecast", "only_told", is_flag=True, help="Say what it would cost, and end.")
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
    help="Where probes are kept, to go on with.  [OUT.work]",
)
@tools_option
def probe(
    base: Path,
    matrix: Path | None,
    errors: Path | None,
    hessians: Path | None,
    text: Path,
    chunks: int | None,
    threads: int,
    cheap: bool,
    part: str | None,
    parts: tuple[Path, ...],
    only_told: bool,
    out: Path,
    work: Path | None,
    llama_cpp: Path | None,
) -> None:
    """Measure the sensitivities of BASE, for `quant allocate --sensitivity`. A run that was ended continues.

    Several machines share the probes: each with --part, and one of them, or a last one, with --merge of what the others
    wrote.
    """
    from quant.core import files
    from quant.core.store import Store
    from quant.evaluate import error_measurement, probe
    from quant.evaluate.compare import EvaluationSettings
    from quant.llama import toolchain
    from quant.llama.model_file import ModelFile
    from quant.plan import error_table

    tools = toolchain.find_toolchain(llama_cpp)
    store = Store((work or out.with_name(out.name + ".work")).resolve())
    errors = errors or store.root / "errors.json"
    if not errors.exists():
        error_table.write_error_table(
            errors, error_measurement.measure_errors(base, matrix, tools, hessians=hessians)
        )
    found = error_table.read_error_table(errors, files.hash_file(base))
    error_table.check_hessian_digest(errors, found.moments, hessians)
    setting = probe.ProbeSettings(
        base=ModelFile.open(base.resolve()),
        imatrix=matrix and matrix.resolve(),
        text=text.resolve(),
        tools=tools,
        store=store,
        evaluation=EvaluationSettings(chunks=chunks, threads=threads),
        hessians=hessians and hessians.resolve(),
    )
    wanted = probe.list_probes(setting.base.tensors, found, cheap=cheap)
    here = probe.select_part(wanted, part) if part else wanted
    measure(out, found, setting, here, parts=parts, whole=not part, only_told=only_told)


def measure(
    out: Path,
    errors: "ErrorTable",
    setting: "ProbeSettings",
    wanted: "tuple[Probe, ...]",
    *,
    parts: tuple[Path, ...] = (),
    whole: bool = True,
    only_told: bool = False,
) -> None:
    """Measure probes, put those of other machines to them, and write what they say of each tensor if that is all."""
    from quant.evaluate import probe
    from quant.plan import sensitivity

    told = probe.describe_probes(setting)
    elsewhere = [m for path in parts for m in _elsewhere(path, errors.base, told)]
    have = {frozenset(m.probe.types.items()) for m in elsewhere}
    here = [p for p in wanted if frozenset(p.types.items()) not in have]
    progress.print_line(probe.forecast_probes(here, setting))
    if only_told:
        return
    with setting.store.lock():
        measured = probe.measure_probes(
            here, setting, lambda done, of: progress.print_line(f"probes: {done} of {of}")
        )
    every = (*measured, *elsewhere)
    source = f"{len(every)} probes on {told}"
    found = (
        sensitivity.fit_sensitivities(every, errors, source)
        if whole
        else sensitivity.Sensitivities(errors.base, source, {}, 1.0, every)
    )
    sensitivity.write_sensitivities(out, found)
    progress.print_line(f"{out}: {source}" + ("" if whole else "; a part, to be merged"))


def _elsewhere(path: Path, base: str, told: str) -> "tuple[ProbeResult, ...]":
    from quant.plan import sensitivity

    found = sensitivity.read_sensitivities(path, base)
    if not found.source.endswith(f" on {told}"):
        raise InputError(
            f"{path}: measured otherwise: expected probes on {told}, found {found.source}"
        )
    return found.probes
