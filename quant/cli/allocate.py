"""The command that allocates types to tensors for files of given sizes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.cli import progress, tables
from quant.cli.evaluate import chunks_option, text_option, threads_option
from quant.cli.options import (
    FILE,
    FOLDER,
    collect_options,
    hessians_option,
    json_option,
    quant,
    tools_option,
)

if TYPE_CHECKING:
    from quant.evaluate.allocation import AllocationRequest
    from quant.plan.allocate import Allocation
    from quant.plan.units import Constraints


@dataclass(frozen=True)
class AllocateOptions:
    """The options of ``quant allocate``."""

    what: str
    matrix: Path | None
    sizes: tuple[str, ...]
    bpw: float | None
    memory: str | None
    as_ladder: bool
    errors: Path | None
    sensitivity: Path | None
    hessians: Path | None
    texts: tuple[Path, ...]
    chunks: int | None
    threads: int
    measured: int | None
    types: tuple[str, ...]
    exclude: tuple[str, ...]
    pins: tuple[str, ...]
    most_types: int | None
    gate_up_alike: bool
    mtp_pinned: bool
    coverage: bool
    monotone: bool
    friendly: tuple[str, ...]
    name: str
    out: Path
    work: Path | None
    llama_cpp: Path | None
    as_json: bool

    def to_constraints(self) -> "Constraints":
        """Return the constraints. Raise UsageError for a pin that is no REGEX=TYPE."""
        from quant.plan.units import SLOW_TYPES, Constraints

        if any("=" not in pin for pin in self.pins):
            raise click.UsageError("--pin: expected REGEX=TYPE")
        # Several machines: a type is left out if it is slow on one of them.
        slow = (SLOW_TYPES[machine] for machine in self.friendly)
        return Constraints(
            gate_up_alike=self.gate_up_alike,
            most_types=self.most_types,
            mtp_pinned=self.mtp_pinned,
            # From the right: a regex may contain `=`, a type does not.
            pinned=dict(pin.rsplit("=", 1) for pin in self.pins),
            excluded=frozenset(self.exclude).union(*slow),
        )

    def to_request(self) -> "AllocationRequest":
        """Return the request. Raise UsageError unless exactly one kind of size is given."""
        from quant.evaluate.allocation import AllocationRequest
        from quant.plan.error_table import CANDIDATES

        # Each of them fixes the bytes, so two would contradict each other.
        if sum(map(bool, (self.sizes, self.bpw, self.memory, self.as_ladder))) != 1:
            raise click.UsageError("expected one of --size, --bpw, --fits and --ladder")
        return AllocationRequest(
            model=self.what,
            sizes=self.sizes,
            bpw=self.bpw,
            fits=self.memory,
            ladder=self.as_ladder,
            name=self.name,
            constraints=self.to_constraints(),
            monotone=self.monotone,
            types=self.types or CANDIDATES,
            coverage=self.coverage,
            imatrix=self.matrix,
            errors=self.errors,
            sensitivities=self.sensitivity,
            hessians=self.hessians,
            text=self.texts[0] if self.texts else None,
            chunks=self.chunks,
            threads=self.threads,
            measured=self.measured,
            # Beside OUT and kept: measuring takes hours, and the next call reads what it finds
            # there.
            work=self.work or self.out.with_name(f"{self.out.name}.work"),
            llama_cpp=self.llama_cpp,
        )


@quant.command(short_help="Choose tensor types for a file size.")
@click.argument("what")
@click.option("--imatrix", "matrix", type=FILE, help="Importance matrix of the GGUF.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="SIZE",
    help="Size of the whole file: 84GB, 80GiB, 4843584B. Repeatable.",
)
@click.option("--bpw", type=click.FloatRange(1, 16), help="Bits per weight, instead of a size.")
@click.option(
    "--fits",
    "memory",
    metavar="TEXT",
    help="Memory budget instead of a size: '24GB gpu + 128GB ram, ctx 16384'.",
)
@click.option(
    "--ladder", "as_ladder", is_flag=True, help="The sizes of all UD-* variants of the MODEL."
)
@click.option(
    "--errors",
    type=FILE,
    help="Error table; measured and written if the file does not exist.  [in --work]",
)
@click.option(
    "--sensitivity",
    type=FILE,
    help="Sensitivities; measured and written if the file does not exist.  [in --work]",
)
@hessians_option
@text_option
@chunks_option
@threads_option
@click.option(
    "--measured",
    type=click.IntRange(2),
    metavar="N",
    help="Build and evaluate N candidates for each size, refit the sensitivities, keep the best.",
)
@click.option(
    "--type", "types", multiple=True, metavar="T", help="Choose among these types. Repeatable."
)
@click.option("--exclude", multiple=True, metavar="T", help="Do not use this type. Repeatable.")
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="REGEX=T",
    help="Type of the tensors whose whole name matches. Repeatable.",
)
@click.option(
    "--most-types", type=click.IntRange(1), help="Maximum number of types in a class of tensors."
)
@click.option(
    "--gate-up-alike/--gate-up-apart",
    default=True,
    help="Whether gate and up projection of a layer share a type.  [alike]",
)
@click.option(
    "--mtp-pinned/--mtp-free",
    default=True,
    help="Whether MTP blocks have fixed types.  [pinned]",
)
@click.option(
    "--coverage/--no-coverage",
    default=True,
    help="Whether tensors with insufficient imatrix coverage keep a floor.  [they do]",
)
@click.option(
    "--monotone/--not-monotone",
    default=True,
    help="Whether no tensor gets a larger type in a smaller file.  [monotone]",
)
@click.option(
    "--friendly",
    type=click.Choice(("apple", "arm", "cuda")),
    multiple=True,
    help="Leave out types that are slow there. Repeatable.",
)
@click.option("--name", default="ALLOCATED", show_default=True, help="Name of the variant.")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="The .toml to write, or a folder for several.",
)
@click.option(
    "--work",
    type=FOLDER,
    envvar="QUANT_WORK",
    help="Where measurements are kept, to continue from.  [OUT.work]",
)
@tools_option
@json_option
@collect_options(AllocateOptions)
def allocate(options: AllocateOptions) -> None:
    """Choose tensor types so that a file of at most a given size has the least KLD against BF16.

    WHAT is a BF16 GGUF, which is measured (an interrupted run continues), or the name of a MODEL.
    Of a name nothing can be measured: priors by class are used, and the variant says so.
    """
    from quant.evaluate.allocation import allocate as run

    request = options.to_request()
    with progress.show_log():
        result = run(request)
    for path, allocation in zip(result.write(options.out), result.allocations, strict=True):
        progress.print_line(f"{path}: {len(allocation.variant.rules)} rules")
    if options.as_json:
        click.echo(json.dumps(result.json(), ensure_ascii=False))
    else:
        _show(result.allocations)


def _show(allocations: "tuple[Allocation, ...]") -> None:
    columns = ("variant", ">target", ">bytes", ">of it", ">predicted KLD", ">gap", ">rules")
    rows = [
        (
            a.variant.name,
            f"{a.target.bytes:,}",
            f"{a.bytes:,}",
            f"{100 * a.bytes / a.target.bytes:.2f} %",
            f"{a.solution.kld:.5f}",
            _format_gap(a),
            str(len(a.variant.rules)),
        )
        for a in allocations
    ]
    tables.print_table(columns, rows)


def _format_gap(allocation: "Allocation") -> str:
    # The gap is one of the predicted KLD. A candidate that was measured has no bound.
    if allocation.measured_kld is not None:
        return f"measured {allocation.measured_kld:.5f}"
    return f"{100 * allocation.solution.gap:.3f} %"
