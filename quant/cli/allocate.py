"""The command that shares out the bits of a size."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.cli import progress, tables
from quant.cli.evaluate import chunks_option, text_option, threads_option
from quant.cli.options import FILE, FOLDER, hessians_option, json_option, quant, tools_option

if TYPE_CHECKING:
    from quant.core.store import Store
    from quant.evaluate.probe import ProbeSettings
    from quant.llama.toolchain import Toolchain
    from quant.plan.budgets import Allocation, AllocationInputs, Maker, SizeTarget
    from quant.plan.solver import Constraints


@quant.command()
@click.argument("what")
@click.option("--imatrix", "matrix", type=FILE, help="The importance matrix of BASE.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="SIZE",
    help="Of the whole file: 84GB, 80GiB, 4843584B; repeatable.",
)
@click.option("--bpw", type=click.FloatRange(1, 16), help="Bits per weight, instead of a size.")
@click.option(
    "--fits", "memory", metavar="TEXT", help="'24GB gpu + 128GB ram, ctx 16384', instead of a size."
)
@click.option(
    "--ladder", "as_ladder", is_flag=True, help="The sizes of all UD-* variants of the MODEL."
)
@click.option(
    "--errors", type=FILE, help="An error database; written there if it is not there.  [in --work]"
)
@click.option(
    "--sensitivity",
    type=FILE,
    help="Sensitivities; measured and written there if it is not there.  [in --work]",
)
@hessians_option
@text_option
@chunks_option
@threads_option
@click.option(
    "--measured",
    type=click.IntRange(2),
    metavar="N",
    help="Build and read N whole files for each size, mend the sensitivities by them, and take the best.",
)
@click.option(
    "--type", "types", multiple=True, metavar="T", help="Choose among these only; repeatable."
)
@click.option("--exclude", multiple=True, metavar="T", help="Not this type; repeatable.")
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="REGEX=T",
    help="Tensors of this whole name have this type; repeatable.",
)
@click.option("--most-types", type=click.IntRange(1), help="In one class of tensors.")
@click.option(
    "--gate-up-alike/--gate-up-apart",
    default=True,
    help="Whether gate and up of a layer share a type.  [alike]",
)
@click.option(
    "--mtp-pinned/--mtp-free",
    default=True,
    help="Whether an MTP block has types of its own.  [pinned]",
)
@click.option(
    "--coverage/--no-coverage",
    default=True,
    help="Whether tensors that the imatrix hardly saw keep a floor.  [they do]",
)
@click.option(
    "--monotone/--not-monotone",
    default=True,
    help="Whether no tensor is finer in a smaller file.  [monotone]",
)
@click.option(
    "--friendly",
    type=click.Choice(("apple", "arm", "cuda")),
    multiple=True,
    help="Leave out what is slow there; repeatable.",
)
@click.option("--name", default="ALLOCATED", show_default=True, help="Of the variant.")
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
    help="Where probes are kept, to go on with.  [OUT.work]",
)
@tools_option
@json_option
def allocate(
    what: str,
    matrix: Path | None,
    sizes: tuple[str, ...],
    bpw: float | None,
    memory: str | None,
    as_ladder: bool,
    errors: Path | None,
    sensitivity: Path | None,
    hessians: Path | None,
    texts: tuple[Path, ...],
    chunks: int | None,
    threads: int,
    measured: int | None,
    types: tuple[str, ...],
    exclude: tuple[str, ...],
    pins: tuple[str, ...],
    most_types: int | None,
    gate_up_alike: bool,
    mtp_pinned: bool,
    coverage: bool,
    monotone: bool,
    friendly: tuple[str, ...],
    name: str,
    out: Path,
    work: Path | None,
    llama_cpp: Path | None,
    as_json: bool,
) -> None:
    """Share out the bits of a size: the types with which a file of at most that size is nearest to its base.

    WHAT is a BF16 GGUF, whose tensors are probed (a run that was ended continues), or the name of a MODEL, of which nothing
    is measured: then priors by class serve, and the variant says so.
    """
    from quant.core.store import Store
    from quant.llama import toolchain
    from quant.llama.types import find_type
    from quant.plan import budgets
    from quant.plan.error_table import CANDIDATES
    from quant.plan.solver import SLOW, Constraints

    for kind in (*types, *exclude):
        find_type(kind)
    if sum(map(bool, (sizes, bpw, memory, as_ladder))) != 1:
        raise click.UsageError("expected one of --size, --bpw, --fits and --ladder")
    if any("=" not in pin for pin in pins):
        raise click.UsageError("--pin: expected REGEX=TYPE")
    store = Store((work or out.with_name(out.name + ".work")).resolve())
    pinned = dict(pin.rsplit("=", 1) for pin in pins)
    left_out = frozenset(exclude).union(*(SLOW[machine] for machine in friendly))
    constraints = Constraints(gate_up_alike, most_types, mtp_pinned, pinned, left_out)

    def targets_of(material: "AllocationInputs") -> "dict[str, SizeTarget]":
        found = _targets(what, material, sizes, bpw, memory, name, as_ladder)
        for target in found.values():
            budgets.check_target(material, target, constraints)
        return found

    maker: Maker = budgets.allocate_variant
    if Path(what).suffix == ".gguf":
        tools = toolchain.find_toolchain(llama_cpp)
        unprobed = _unprobed(
            Path(what),
            matrix,
            types or CANDIDATES,
            errors,
            hessians,
            store,
            tools,
            coverage=coverage,
        )
        targets_of(unprobed)
        reading = partial(
            _setting, Path(what), matrix, hessians, texts, chunks, threads, store, tools
        )
        material = _probed(unprobed, sensitivity or store.root / "sensitivity.json", reading)
        maker = _searching(reading(), measured) if measured else maker
    elif measured or hessians:
        option = "--measured" if measured else "--hessians"
        raise click.UsageError(
            f"{option}: expected a BF16 GGUF, of a MODEL's name there is nothing to build"
        )
    else:
        material = _known(what, types or CANDIDATES)
    targets = targets_of(material)
    if len(targets) == 1:
        ((title, target),) = targets.items()
        made: tuple[Allocation, ...] = (
            maker(material, target, title, _summary(target), constraints),
        )
    else:
        made = budgets.allocate_ladder(
            material, targets, constraints, monotone=monotone, maker=maker
        )
    for a in made:
        _write(a, material, out if len(targets) == 1 else out / f"{a.variant.name}.toml")
    if as_json:
        click.echo(
            json.dumps({"model": what, "variants": [_told(a) for a in made]}, ensure_ascii=False)
        )
    else:
        _show_allocations(made)


def _summary(target: "SizeTarget") -> str:
    return f"Allocated for {target.bytes:,} bytes."


def _known(model: str, types: tuple[str, ...]) -> "AllocationInputs":
    from quant.plan import priors
    from quant.plan.budgets import AllocationInputs
    from quant.plan.inventory import read_architecture
    from quant.plan.load import load_model
    from quant.plan.plan import find_coverable

    recipe, path = load_model(model)
    told = read_architecture(recipe.architecture, f"{path}: architecture")
    tensors = told.tensors()
    progress.print_line(f"{model}: nothing is measured; priors by class. {priors.CREDIT}")
    return AllocationInputs(
        tensors,
        frozenset(find_coverable(tensors)),
        priors.make_typical_errors(tensors, types),
        priors.make_prior_sensitivities(tensors),
        recipe.header_bytes,
        kv_bytes=told.kv_bytes_per_token(),
    )


def _unprobed(
    base: Path,
    matrix: Path | None,
    types: tuple[str, ...],
    errors: Path | None,
    hessians: Path | None,
    store: "Store",
    tools: "Toolchain",
    *,
    coverage: bool,
) -> "AllocationInputs":
    """What is known of a file before anything was probed: enough to refuse a size."""
    from quant.calibration import imatrix as matrices
    from quant.core import files
    from quant.evaluate import error_measurement
    from quant.llama.gguf import read_header
    from quant.plan import error_table
    from quant.plan.budgets import AllocationInputs
    from quant.plan.recipe import CoverageRule
    from quant.plan.sensitivity import Sensitivities

    header, digest = read_header(base), files.hash_file(base)
    errors = errors or store.root / "errors.json"
    if not errors.exists():
        progress.print_line(f"{errors}: measuring what {len(types)} types do to each tensor")
        error_table.write_error_table(
            errors,
            error_measurement.measure_errors(base, matrix, tools, types=types, hessians=hessians),
        )
    found = error_table.read_error_table(errors, digest).only(types)
    error_table.check_hessian_digest(errors, found.moments, hessians)
    known = matrices.read_imatrix(matrix, header.tensors) if matrix else None
    return AllocationInputs(
        header.tensors,
        known.covered if known else frozenset(),
        found,
        Sensitivities(digest, "nothing yet", dict.fromkeys(found.errors, 1.0)),
        header.data_start,
        header,
        read_header(matrix) if matrix else None,
        _kv_bytes(header.metadata),
        known.doubt(header.tensors, CoverageRule()) if known and coverage else None,
    )


def _setting(
    base: Path,
    matrix: Path | None,
    hessians: Path | None,
    texts: tuple[Path, ...],
    chunks: int | None,
    threads: int,
    store: "Store",
    tools: "Toolchain",
) -> "ProbeSettings":
    from quant.evaluate.compare import EvaluationSettings
    from quant.evaluate.probe import ProbeSettings
    from quant.evaluate.texts import render_set
    from quant.llama.model_file import ModelFile

    model, evaluation = (
        ModelFile.open(base.resolve()),
        EvaluationSettings(chunks=chunks, threads=threads),
    )
    text = (
        texts[0] if texts else render_set("embedded", model, evaluation.context, tools, store).path
    )
    return ProbeSettings(
        base=model,
        imatrix=matrix and matrix.resolve(),
        text=text.resolve(),
        tools=tools,
        store=store,
        evaluation=evaluation,
        hessians=hessians and hessians.resolve(),
    )


def _probed(
    unprobed: "AllocationInputs", path: Path, reading: "Callable[[], ProbeSettings]"
) -> "AllocationInputs":
    """With the sensitivities of a file, which is written from probes if it is not there."""
    from quant.cli.probe import measure
    from quant.errors import InputError
    from quant.evaluate import probe
    from quant.plan import sensitivity

    if not path.exists():
        measure(
            path, unprobed.errors, reading(), probe.list_probes(unprobed.tensors, unprobed.errors)
        )
    found = sensitivity.read_sensitivities(path, unprobed.errors.base)
    wanted = (
        f"{probe.COMPENSATION_MARK} {unprobed.errors.moments[:12]}"
        if unprobed.errors.moments
        else None
    )
    if wanted not in found.source if wanted else probe.COMPENSATION_MARK in found.source:
        raise InputError(
            f"{path}: expected probes {wanted or 'with the rounding of ggml'}, found {found.source}; name another file, or"
            " take it away"
        )
    return replace(unprobed, sensitivities=found)


def _searching(setting: "ProbeSettings", count: int) -> "Maker":
    """Makes an allocation by building and reading so many files."""
    from quant.evaluate.probe import measure_probes
    from quant.plan.search import search_allocations
    from quant.plan.sensitivity import Probe

    def read(some: Sequence[Mapping[str, str]]) -> list[float]:
        with setting.store.lock():
            found = measure_probes([Probe("whole", types) for types in some], setting)
        progress.print_line(f"whole files: {', '.join(f'{m.kld:.5f}' for m in found)}")
        return [m.kld for m in found]

    def maker(
        material: "AllocationInputs",
        target: "SizeTarget",
        name: str,
        summary: str,
        limits: "Constraints",
    ) -> "Allocation":
        found = search_allocations(material, target, name, summary, limits, read, count)
        progress.print_line(
            f"{name}: {found.first_kld:.5f} where the search began, {found.kld:.5f} where it ended"
        )
        return found.best

    return maker


def _kv_bytes(metadata: Mapping[str, Any]) -> int:
    """Keys and values of a token in F16, as the file's own numbers tell it."""
    architecture = metadata.get("general.architecture")
    told = {
        key: metadata.get(f"{architecture}.{key}")
        for key in ("block_count", "attention.head_count_kv", "attention.key_length")
    }
    if not all(isinstance(v, int) for v in told.values()):
        return 0
    return (
        2
        * 2
        * int(told["block_count"] or 0)
        * int(told["attention.head_count_kv"] or 0)
        * int(told["attention.key_length"] or 0)
    )


def _targets(
    what: str,
    material: "AllocationInputs",
    sizes: tuple[str, ...],
    bpw: float | None,
    memory: str | None,
    name: str,
    as_ladder: bool,
) -> dict[str, "SizeTarget"]:
    from quant.plan import budgets

    if bpw:
        return {name: budgets.make_bpw_target(material, bpw)}
    if memory:
        return {name: budgets.parse_memory_budget(memory, material.kv_bytes)}
    if as_ladder:
        return _published(what, material)
    return {
        f"{name}-{s}" if len(sizes) > 1 else name: budgets.SizeTarget(budgets.parse_file_size(s))
        for s in sizes
    }


def _published(what: str, material: "AllocationInputs") -> dict[str, "SizeTarget"]:
    """The sizes of the model's hand-made UD-* variants."""
    from quant.plan.budgets import SizeTarget
    from quant.plan.load import load_model, load_variant
    from quant.plan.plan import make_plan

    model = load_model("tiny-glm" if Path(what).suffix == ".gguf" else what)[0]
    plans = [
        make_plan(load_variant(v), material.tensors, material.covered)
        for v in model.variants
        if v.startswith("UD-")
    ]
    return {p.variant.name: SizeTarget(material.file_bytes(p)) for p in plans}


def _write(a: "Allocation", material: "AllocationInputs", path: Path) -> None:
    from quant.core import files
    from quant.plan.fold import format_variant as text
    from quant.plan.load import list_recipes as known
    from quant.plan.load import load_variant

    s = material.sensitivities
    comments = [
        f"Made by `quant allocate` for {a.target.bytes:,} bytes: {a.bytes:,}, predicted mean KLD {a.solution.damage:.4g},",
        f"{_how_good(a)}. Sensitivities: {s.source}.",
        *([s.credit] if s.credit else []),
    ]
    variant, shipped = a.variant, known("variants")
    if (
        variant.name in shipped
    ):  # a ladder's file is cut, and has to answer, as the one made by hand
        by_hand = load_variant(variant.name)
        variant = replace(
            variant, split=by_hand.split, answers=by_hand.answers, summary=by_hand.summary
        )
    files.write_text(path, text(variant, comments))
    progress.print_line(f"{path}: {len(a.variant.rules)} rules")


def _how_good(a: "Allocation") -> str:
    if a.measured is not None:
        return f"measured {a.measured:.4g} on that text: the best of the files that were built"
    return f"at most {100 * a.solution.gap:.3f} % above the best possible"


def _told(a: "Allocation") -> dict[str, Any]:
    return {
        "name": a.variant.name,
        "target": a.target.bytes,
        "bytes": a.bytes,
        "kld_predicted": a.solution.damage,
        "kld_measured": a.measured,
        "gap": None if a.measured else a.solution.gap,
        "rules": len(a.variant.rules),
    }


def _gap(a: "Allocation") -> str:
    return f"{100 * a.solution.gap:.3f} %" if a.measured is None else f"measured {a.measured:.5f}"


def _show_allocations(made: "tuple[Allocation, ...]") -> None:
    rows = [
        (
            a.variant.name,
            f"{a.target.bytes:,}",
            f"{a.bytes:,}",
            f"{100 * a.bytes / a.target.bytes:.2f} %",
            f"{a.solution.damage:.5f}",
            _gap(a),
            str(len(a.variant.rules)),
        )
        for a in made
    ]
    tables.print_table(
        ("variant", ">target", ">bytes", ">of it", ">predicted KLD", ">gap", ">rules"), rows
    )
