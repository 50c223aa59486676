"""What ``quant allocate`` does: measure a model, or take priors, and allocate types to its tensors.

The order is that of cost: a request that cannot be met is refused before anything is measured, a
size out of reach before anything is probed. ``quant.plan.allocate`` decides; this module measures.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant.calibration.imatrix import read_imatrix
from quant.core import files
from quant.core.errors import InputError, raise_problems
from quant.core.store import Store
from quant.evaluate.compare import EvaluationSettings
from quant.evaluate.probe import (
    COMPENSATION_MARK,
    ProbeSettings,
    describe_probes,
    forecast_probes,
    list_probes,
    measure_probes,
)
from quant.evaluate.sensitivity_measurement import ERRORS_NAME, prepare_error_table, run_probes
from quant.evaluate.texts import render_set
from quant.llama.gguf import read_header
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain, find_toolchain
from quant.llama.types import find_type
from quant.plan import priors
from quant.plan.allocate import (
    Allocation,
    AllocationInputs,
    Allocator,
    allocate_ladder,
    allocate_variant,
    check_target,
)
from quant.plan.budgets import SizeTarget, make_bpw_target, parse_file_size, parse_memory_budget
from quant.plan.error_table import CANDIDATES
from quant.plan.fit import fit_sensitivities
from quant.plan.format import format_allocation
from quant.plan.inventory import read_architecture
from quant.plan.load import (
    find_model_of_file,
    find_name_problems,
    list_recipes,
    load_model,
    load_variant,
)
from quant.plan.plan import find_coverable, make_plan
from quant.plan.recipe import CoverageRule
from quant.plan.search import search_allocations
from quant.plan.sensitivity import (
    Probe,
    Sensitivities,
    read_sensitivities,
    write_sensitivities,
)
from quant.plan.sizes import read_kv_cache
from quant.plan.units import Constraints

log = logging.getLogger(__name__)
SENSITIVITIES_NAME = "sensitivity.json"
"""The sensitivities in a work folder."""
DEFAULT_LADDER_MODEL = "tiny-glm"
"""Whose ladder a GGUF gets that is named like no shipped model; it has all UD variants."""


@dataclass(frozen=True, kw_only=True)
class AllocationRequest:
    """A model, the sizes to allocate types for, and how.

    Exactly one of ``sizes``, ``bpw``, ``fits`` and ``ladder`` is given.
    """

    model: str
    """Path of a BF16 GGUF, which is measured, or name of a model recipe, which gets priors."""
    sizes: tuple[str, ...] = ()
    """Sizes of whole files: 84GB, 80GiB, 4843584B."""
    bpw: float | None = None
    """Bits per weight."""
    fits: str | None = None
    """A memory budget: ``24GB gpu + 128GB ram, ctx 16384``."""
    ladder: bool = False
    """The sizes of all UD-* variants of the model's recipe."""
    name: str = "ALLOCATED"
    """Name of the variant; of several sizes, each adds its size."""
    constraints: Constraints = field(default_factory=Constraints)
    monotone: bool = True
    """No tensor gets a larger type in a smaller file."""
    types: tuple[str, ...] = CANDIDATES
    """The types to choose from."""
    coverage: bool = True
    """Whether tensors with insufficient imatrix coverage keep a floor."""
    imatrix: Path | None = None
    """Importance matrix of the GGUF."""
    errors: Path | None = None
    """The error table; measured and written if the file does not exist. None keeps it in
    ``work``."""
    sensitivities: Path | None = None
    """The sensitivities, likewise."""
    hessians: Path | None = None
    """Hessians for error compensation (GPTQ); None quantizes as llama-quantize does."""
    text: Path | None = None
    """Text for probes, from the calibration side; None takes the embedded calibration set."""
    chunks: int | None = None
    """Maximum number of chunks of the text; None reads all of it."""
    threads: int = 2
    measured: int | None = None
    """Build and evaluate so many whole files for each size, and take the best."""
    work: Path | None = None
    """Where measurements are kept, to continue from; None keeps nothing."""
    llama_cpp: Path | None = None
    """Folder of llama.cpp's tools; None searches."""

    @property
    def is_file(self) -> bool:
        """Whether the model is a GGUF, which can be measured."""
        return Path(self.model).suffix == ".gguf"


@dataclass(frozen=True)
class AllocationResult:
    """The variants that were allocated."""

    model: str
    """As in the request."""
    allocations: tuple[Allocation, ...]
    """The largest first."""
    sensitivities: Sensitivities
    """What they were allocated with."""

    def json(self) -> dict[str, Any]:
        """Return the document that ``quant allocate --json`` prints."""
        return {"model": self.model, "variants": [a.json() for a in self.allocations]}

    def write(self, out: Path) -> list[Path]:
        """Write the variants as recipes, and return their paths.

        Args:
            out: The file of a single variant, or the folder of several.
        """
        single = len(self.allocations) == 1
        paths = [out if single else out / f"{a.variant.name}.toml" for a in self.allocations]
        for path, a in zip(paths, self.allocations, strict=True):
            files.write_text(path, format_allocation(a, self.sensitivities))
        return paths


def allocate(request: AllocationRequest) -> AllocationResult:
    """Allocate types to tensors, so that files of given sizes have the least predicted KLD.

    A GGUF is measured: the error of every type on every tensor, then probes. A run that was
    interrupted continues in the same work folder. A model's name gets priors, which
    ``sensitivities`` name.

    Args:
        request: The model, the sizes and the constraints.

    Returns:
        A variant for each size, with its predicted KLD and the proven gap to the optimum.

    Raises:
        InputError: The request contradicts itself, a size is out of reach, or a file is of another
            model.

    Example:
        >>> result = allocate(AllocationRequest(model="tiny-glm", sizes=("5MB",)))
        >>> [(a.variant.name, a.bytes <= 5_000_000) for a in result.allocations]
        [('ALLOCATED', True)]
    """
    raise_problems(_find_request_problems(request))
    # Only for its error: a misspelled type would end the work after hours of measuring.
    for kind in (*request.types, *sorted(request.constraints.excluded)):
        find_type(kind)
    if not request.is_file:
        return _allocate_inputs(request, make_prior_inputs(request.model, request.types))
    with tempfile.TemporaryDirectory(prefix="quant-allocate-") as temporary:
        store = Store((request.work or Path(temporary)).resolve())
        tools = find_toolchain(request.llama_cpp)
        base = ModelFile.open(Path(request.model).resolve())
        inputs = _measure_errors(request, base, store, tools)
        _make_targets(request, inputs)  # refuses a size out of reach before anything is probed
        path = request.sensitivities or store.root / SENSITIVITIES_NAME
        settings = None
        if request.measured or not path.exists():
            settings = _make_probe_settings(request, base, store, tools)
        if not path.exists() and settings:
            _measure_sensitivities(path, inputs, settings)
        inputs = replace(inputs, sensitivities=_read_sensitivities(path, inputs))
        if request.measured and settings:
            return _allocate_inputs(request, inputs, _make_search(settings, request.measured))
        return _allocate_inputs(request, inputs)


def make_prior_inputs(model: str, types: Sequence[str] = CANDIDATES) -> AllocationInputs:
    """Return what is known of a model before anything is measured: tensors, and priors by class.

    Args:
        model: Name or path of a model recipe.
        types: The types to choose from.

    Raises:
        InputError: The recipe does not exist, or its ``[architecture]`` is missing or wrong.
    """
    recipe, path = load_model(model)
    architecture = read_architecture(recipe.architecture, f"{path}: architecture")
    tensors = architecture.tensors()
    log.info("%s: nothing is measured; priors by class. %s", model, priors.CREDIT)
    return AllocationInputs(
        tensors=tensors,
        covered=frozenset(find_coverable(tensors)),
        errors=priors.make_typical_errors(tensors, types),
        sensitivities=priors.make_prior_sensitivities(tensors),
        head_bytes=recipe.header_bytes,
        kv_bytes=architecture.kv_bytes_per_token(),
    )


def _find_request_problems(request: AllocationRequest) -> Iterator[str]:
    if sum(map(bool, (request.sizes, request.bpw, request.fits, request.ladder))) != 1:
        yield "size: expected one of sizes, bpw, fits and ladder"
    yield from find_name_problems(request.name, "name")
    if not request.is_file:
        for option in ("measured", "hessians"):
            if getattr(request, option):
                yield (
                    f"{option}: expected a BF16 GGUF, found {request.model!r}: a model's name has"
                    " no weights to build with"
                )


def _measure_errors(
    request: AllocationRequest, base: ModelFile, store: Store, tools: Toolchain
) -> AllocationInputs:
    """Return what is known of a file before it is probed; all sensitivities are 1."""
    table = prepare_error_table(
        request.errors or store.root / ERRORS_NAME,
        base=base,
        imatrix=request.imatrix,
        hessians=request.hessians,
        tools=tools,
        types=request.types,
    ).select_types(request.types)
    imatrix = read_imatrix(request.imatrix, base.tensors) if request.imatrix else None
    policy = None
    if imatrix and request.coverage:
        policy = imatrix.make_coverage_policy(base.tensors, CoverageRule())
    # Placeholders. What is checked before anything is probed is sizes, which need no sensitivities.
    equal = dict.fromkeys(table.errors, 1.0)
    return AllocationInputs(
        tensors=base.tensors,
        covered=imatrix.covered if imatrix else frozenset(),
        errors=table,
        sensitivities=Sensitivities(base=base.digest, source="nothing yet", scales=equal),
        head_bytes=base.header.data_start,
        base=base.header,
        imatrix=read_header(request.imatrix) if request.imatrix else None,
        kv_bytes=read_kv_cache(base.metadata).bytes_per_token,
        policy=policy,
    )


def _make_probe_settings(
    request: AllocationRequest, base: ModelFile, store: Store, tools: Toolchain
) -> ProbeSettings:
    evaluation = EvaluationSettings(chunks=request.chunks, threads=request.threads)
    # The calibration side of the set. Its held-out part is what files are judged on: probes that
    # read it would fit the allocation to the test.
    text = request.text or render_set("embedded", base, evaluation.context, tools, store).path
    return ProbeSettings(
        base=base,
        imatrix=request.imatrix and request.imatrix.resolve(),
        text=text.resolve(),
        tools=tools,
        store=store,
        evaluation=evaluation,
        hessians=request.hessians and request.hessians.resolve(),
    )


def _measure_sensitivities(path: Path, inputs: AllocationInputs, settings: ProbeSettings) -> None:
    probes = list_probes(inputs.tensors, inputs.errors)
    log.info(forecast_probes(probes, settings))
    results = run_probes(probes, settings)
    source = f"{len(results)} probes on {describe_probes(settings)}"
    write_sensitivities(path, fit_sensitivities(results, inputs.errors, source))
    log.info("%s: %s", path, source)


def _read_sensitivities(path: Path, inputs: AllocationInputs) -> Sensitivities:
    """Return sensitivities whose probes were quantized as the error table's measurements were."""
    sensitivities = read_sensitivities(path, inputs.errors.base)
    # Sensitivities are KLD per error, and errors with Hessians are another measure: they include
    # the correlation of columns, and what GPTQ compensates.
    hessians = inputs.errors.hessians
    expected = f"{COMPENSATION_MARK} {hessians[:12]}" if hessians else COMPENSATION_MARK
    if (expected in sensitivities.source) != bool(hessians):
        raise InputError(
            f"{path}: expected probes {expected if hessians else 'with the rounding of ggml'},"
            f" found {sensitivities.source}; name another file, or delete it"
        )
    return sensitivities


def _make_search(settings: ProbeSettings, count: int) -> Allocator:
    """Return an allocator that builds and evaluates ``count`` files for each size."""

    def measure(candidates: Sequence[Mapping[str, str]]) -> list[float]:
        # A whole file is a probe of all its tensors. So it has a place in the store, and a search
        # that was interrupted continues.
        probes = [Probe("whole", types) for types in candidates]
        with settings.store.lock():
            results = measure_probes(probes, settings)
        log.info("whole files: %s", ", ".join(f"{r.kld:.5f}" for r in results))
        return [r.kld for r in results]

    def search(
        inputs: AllocationInputs, target: SizeTarget, name: str, constraints: Constraints
    ) -> Allocation:
        result = search_allocations(
            inputs=inputs,
            target=target,
            name=name,
            constraints=constraints,
            measure=measure,
            count=count,
        )
        log.info(
            "%s: mean KLD %.5f at the start of the search, %.5f at its end",
            name,
            result.first_kld,
            result.kld,
        )
        return result.best

    return search


def _allocate_inputs(
    request: AllocationRequest,
    inputs: AllocationInputs,
    allocator: Allocator = allocate_variant,
) -> AllocationResult:
    allocations = allocate_ladder(
        inputs,
        _make_targets(request, inputs),
        request.constraints,
        monotone=request.monotone,
        allocator=allocator,
    )
    shipped = tuple(_keep_shipped_settings(a) for a in allocations)
    return AllocationResult(request.model, shipped, inputs.sensitivities)


def _keep_shipped_settings(allocation: Allocation) -> Allocation:
    """Give a variant of a ladder what the shipped one of its name has beside the rules."""
    variant = allocation.variant
    if variant.name not in list_recipes("variants"):
        return allocation
    shipped = load_variant(variant.name)
    kept = {key: getattr(shipped, key) for key in ("split", "answers", "summary")}
    return replace(allocation, variant=replace(variant, **kept))


def _make_targets(request: AllocationRequest, inputs: AllocationInputs) -> dict[str, SizeTarget]:
    """Return the size by name of the variant, every one of which can be reached."""
    targets = _list_targets(request, inputs)
    for target in targets.values():
        check_target(inputs, target, request.constraints)
    return targets


def _list_targets(request: AllocationRequest, inputs: AllocationInputs) -> dict[str, SizeTarget]:
    name = request.name
    if request.bpw:
        return {name: make_bpw_target(inputs.tensors, inputs.head_bytes, request.bpw)}
    if request.fits:
        return {name: parse_memory_budget(request.fits, inputs.kv_bytes)}
    if request.ladder:
        return _list_shipped_sizes(request, inputs)
    # "80 GiB" is a size, but a name holds no space.
    suffixes = [f"-{s.replace(' ', '')}" for s in request.sizes] if len(request.sizes) > 1 else [""]
    sizes = zip(suffixes, request.sizes, strict=True)
    return {f"{name}{suffix}": SizeTarget(parse_file_size(size)) for suffix, size in sizes}


def _list_shipped_sizes(
    request: AllocationRequest, inputs: AllocationInputs
) -> dict[str, SizeTarget]:
    """Return the sizes of the UD-* variants of the model's recipe."""
    model = request.model
    if request.is_file:
        model = find_model_of_file(Path(model).name) or DEFAULT_LADDER_MODEL
    names = [v for v in load_model(model)[0].variants if v.startswith("UD-")]
    # The sizes that the shipped rules give on these tensors: the new ladder can then be compared
    # with the shipped one at equal bytes.
    plans = [make_plan(load_variant(v), inputs.tensors, inputs.covered) for v in names]
    return {p.variant.name: SizeTarget(inputs.forecast_bytes(p)) for p in plans}
