"""The command that measures how much each part of a model matters, alone or shared among machines."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.cli import progress
from quant.cli.options import FILE, FOLDER, moments_option, quant, tools_option
from quant.errors import InputError

if TYPE_CHECKING:
    from quant.distortion import Distortions
    from quant.probe import Setting
    from quant.sensitivity import Measured, Probe

CONTEXT = 512
"""Tokens in a chunk of a probe."""


@quant.command()
@click.argument("base", type=FILE)
@click.option("--imatrix", "matrix", type=FILE, help="The importance matrix of BASE.")
@click.option("--errors", type=FILE, help="An error database; written there if it is not there.  [in --work]")
@moments_option
@click.option("--text", type=FILE, required=True, help="Calibration-side: never what files are judged by.")
@click.option("--chunks", type=click.IntRange(1), help="Of the text at most.  [all]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--cheap", is_flag=True, help="About forty probes, for models of hundreds of gigabytes.")
@click.option("--part", metavar="I/N", help="Only every Nth probe from the Ith on: the share of one machine.")
@click.option("--merge", "parts", type=FILE, multiple=True, help="Probes that were measured elsewhere; repeatable.")
@click.option("--forecast", "only_told", is_flag=True, help="Say what it would cost, and end.")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="The sensitivities, as JSON.")
@click.option("--work", type=FOLDER, envvar="QUANT_WORK", help="Where probes are kept, to go on with.  [OUT.work]")
@tools_option
def probe(
    base: Path, matrix: Path | None, errors: Path | None, moments: Path | None, text: Path, chunks: int | None,
    threads: int, cheap: bool, part: str | None, parts: tuple[Path, ...], only_told: bool, out: Path, work: Path | None,
    llama_cpp: Path | None,
) -> None:  # fmt: skip
    """Measure the sensitivities of BASE, for `quant allocate --sensitivity`. A run that was ended continues.

    Several machines share the probes: each with --part, and one of them, or a last one, with --merge of what the others
    wrote.
    """
    from quant import distortion, files, probe, toolchain
    from quant.evaluate import Settings
    from quant.header import read_header
    from quant.store import Store

    tools = toolchain.find(llama_cpp)
    store = Store((work or out.with_name(out.name + ".work")).resolve())
    errors = errors or store.root / "errors.json"
    if not errors.exists():
        distortion.write(errors, distortion.measure(base, matrix, tools, moments=moments))
    found = distortion.read(errors, files.digest(base))
    distortion.check_feedback(errors, found.moments, moments)
    setting = probe.Setting(
        base.resolve(), matrix and matrix.resolve(), text.resolve(), tools, store, Settings(CONTEXT, chunks, threads),
        moments=moments and moments.resolve(),
    )  # fmt: skip
    wanted = probe.probes(read_header(base).tensors, found, cheap=cheap)
    here = probe.share(wanted, part) if part else wanted
    measure(out, found, setting, here, parts=parts, whole=not part, only_told=only_told)


def measure(
    out: Path, errors: "Distortions", setting: "Setting", wanted: "tuple[Probe, ...]", *, parts: tuple[Path, ...] = (),
    whole: bool = True, only_told: bool = False,
) -> None:  # fmt: skip
    """Measure probes, put those of other machines to them, and write what they say of each tensor if that is all."""
    from quant import probe, sensitivity

    told = probe.told(setting)
    elsewhere = [m for path in parts for m in _elsewhere(path, errors.base, told)]
    have = {frozenset(m.probe.types.items()) for m in elsewhere}
    here = [p for p in wanted if frozenset(p.types.items()) not in have]
    progress.say(probe.forecast(here, setting))
    if only_told:
        return
    with setting.store.alone():
        measured = probe.measure(here, setting, lambda done, of: progress.say(f"probes: {done} of {of}"))
    every = (*measured, *elsewhere)
    source = f"{len(every)} probes on {told}"
    found = (
        sensitivity.fit(every, errors, source)
        if whole
        else sensitivity.Sensitivities(errors.base, source, {}, 1.0, every)
    )
    sensitivity.write_file(out, found)
    progress.say(f"{out}: {source}" + ("" if whole else "; a part, to be merged"))


def _elsewhere(path: Path, base: str, told: str) -> "tuple[Measured, ...]":
    from quant import sensitivity

    found = sensitivity.read_file(path, base)
    if not found.source.endswith(f" on {told}"):
        raise InputError(f"{path}: measured otherwise: expected probes on {told}, found {found.source}")
    return found.probes
