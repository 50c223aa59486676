"""Variants of given sizes for one model: what is known of it, what a file may weigh, and the allocations between. Pure."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from quant.errors import InputError, raise_problems
from quant.llama.gguf import Header, TensorSpec, pad
from quant.llama.tensors import EXPERTS, tensor_class
from quant.llama.types import TYPES
from quant.plan.error_table import ErrorTable
from quant.plan.fold import fold_types
from quant.plan.plan import CoveragePolicy, Plan, compute_depths, make_plan
from quant.plan.recipe import Variant
from quant.plan.sensitivity import Sensitivities
from quant.plan.sizes import forecast_file_bytes
from quant.plan.solver import Budget, Constraints, Solution, Unit, build_units, solve

SCALES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(SCALES)})")
FITS = re.compile(
    r"(?P<gpu>[^,+]*) gpu(?: \+ (?P<ram>[^,]*) ram)?(?:, ctx (?P<context>\d+))?|(?P<only>[^,+]*) ram(?:, ctx (?P<tokens>\d+))?"
)
MTP_JOINT, MTP_REST = "Q5_K", "Q2_K"
"""An MTP block only guesses ahead, and no text that is read shows its damage: types that need no imatrix, the joint finer."""
ROUNDS = 8
SETTLED = 1e-3
START_NOISE = 0.02


@dataclass(frozen=True)
class AllocationInputs:
    """Everything that is known of a model when its bits are shared out."""

    tensors: tuple[TensorSpec, ...]
    covered: frozenset[str]
    """Tensors with imatrix data."""
    errors: ErrorTable
    sensitivities: Sensitivities
    head_bytes: int
    """Of a file before its tensors, about; exact where the BF16 file is there."""
    base: Header | None = None
    matrix: Header | None = None
    kv_bytes: int = 0
    """KV cache for a token of context."""
    doubt: CoveragePolicy | None = None
    """Tensors that the imatrix knows too badly, which get no type below a floor."""

    def trusted(self) -> ErrorTable:
        """The errors without the types that a tensor in doubt may not have."""
        if not self.doubt or self.doubt.otherwise == "report":
            return self.errors
        specs, concerns = {t.name: t for t in self.tensors}, self.doubt.concerns
        errors = {
            name: {kind: e for kind, e in by_type.items() if not concerns(specs[name], TYPES[kind])}
            for name, by_type in self.errors.errors.items()
        }
        return replace(self.errors, errors=errors)

    def file_bytes(self, planned: Plan) -> int:
        """Length of the whole file."""
        return (
            forecast_file_bytes(planned, self.base, self.matrix)
            if self.base
            else self.head_bytes + planned.bytes
        )

    def fixed_bytes(self) -> int:
        """What is in the file beside the tensors that types are chosen for."""
        types = {
            name: min(kinds, key=lambda k: TYPES[k].bits_per_weight)
            for name, kinds in self.errors.errors.items()
        }
        planned = make_plan(
            fold_types("smallest", "", types, self.tensors), self.tensors, self.covered
        )
        return self.file_bytes(planned) - sum(
            pad(t.bytes) for t in planned.tensors if t.tensor.name in types
        )


@dataclass(frozen=True)
class SizeTarget:
    """How large a file may be."""

    bytes: int
    """Of the whole file."""
    rest_bytes: int | None = None
    """Of what is no routed expert, where that has to fit an accelerator."""


@dataclass(frozen=True)
class Allocation:
    """A variant that was made for a size."""

    variant: Variant
    target: SizeTarget
    solution: Solution
    bytes: int
    """Of the whole file."""
    measured: float | None = None
    """Its divergence on calibration text, where it was built and read."""


Maker = Callable[[AllocationInputs, SizeTarget, str, str, Constraints], Allocation]


def allocate_variant(
    material: AllocationInputs,
    target: SizeTarget,
    name: str,
    summary: str,
    constraints: Constraints,
) -> Allocation:
    """The variant of at most that size with the least predicted divergence.

    Raises InputError for a size that is too small, with the smallest and the largest possible, and for constraints that
    contradict each other.
    """
    raise_problems(_problems(material, constraints))
    fixed, limits = material.fixed_bytes(), _with_mtp(material, constraints)
    solution = _settled(material, target, limits, fixed)
    variant = fold_types(name, summary, solution.types, material.tensors)
    planned = make_plan(variant, material.tensors, material.covered)
    found = {t.tensor.name: t.type.name for t in planned.tensors if t.tensor.name in solution.types}
    assert found == dict(solution.types), "folding lost a type"
    return Allocation(variant, target, solution, material.file_bytes(planned))


def _settled(
    material: AllocationInputs, target: SizeTarget, limits: Constraints, fixed: int
) -> Solution:
    """Solve, see how much noise that makes, and solve again with what noise costs there, until it stays.

    With a power below one the least divergence is the solution for some price of noise, and above one the tangent's.
    """
    found, errors = material.sensitivities, material.trusted()
    inside, best = START_NOISE, None
    for _ in range(ROUNDS):
        damage = found.damage(errors, inside)
        choices = build_units(
            material.tensors, damage, limits, {n: tensor_class(n) for n in damage}
        )
        raise_problems(_size_problems(choices, fixed, target))
        solution = solve(choices, _budgets(target, fixed), limits.most_types)
        told = found.predicted(solution.types, errors)
        if best is None or told < best.damage:
            best = replace(solution, damage=told, bound=told * (1 - solution.gap))
        now = found.noise(solution.types, errors)[0]
        if found.power == 1 or abs(now / inside - 1) < SETTLED:
            break
        inside = now
    assert best
    return best


def _budgets(target: SizeTarget, fixed: int) -> list[Budget]:
    budgets = [Budget(f"a file of {target.bytes:,} bytes", target.bytes - fixed)]
    if target.rest_bytes is not None:
        rest = rf"(?!{EXPERTS.pattern}).*"
        budgets.append(
            Budget("what is no expert, on the accelerator", target.rest_bytes - fixed, rest)
        )
    return budgets


def check_target(material: AllocationInputs, target: SizeTarget, constraints: Constraints) -> None:
    """Raise what :func:`make` would raise of a size or of constraints, before anything was probed."""
    raise_problems(_problems(material, constraints))
    damage = {n: dict.fromkeys(by_type, 1.0) for n, by_type in material.trusted().errors.items()}
    choices = build_units(
        material.tensors,
        damage,
        _with_mtp(material, constraints),
        {n: tensor_class(n) for n in damage},
    )
    raise_problems(_size_problems(choices, material.fixed_bytes(), target))


def allocate_ladder(
    material: AllocationInputs,
    targets: Mapping[str, SizeTarget],
    constraints: Constraints,
    *,
    monotone: bool = True,
    maker: Maker = allocate_variant,
) -> tuple[Allocation, ...]:
    """Variants for several sizes, the largest first: where monotone, no tensor of a smaller file is finer than in a larger."""
    made: list[Allocation] = []
    for name, target in sorted(targets.items(), key=lambda item: -item[1].bytes):
        within = (
            replace(constraints, ceiling=made[-1].solution.types)
            if made and monotone
            else constraints
        )
        made.append(maker(material, target, name, f"Allocated for {target.bytes:,} bytes.", within))
    return tuple(made)


def parse_file_size(text: str) -> int:
    """``84GB``, ``4843584B`` or ``80.5GiB`` as bytes. Raises InputError for anything else."""
    found = SIZE.fullmatch(text.strip())
    if not found:
        raise InputError(
            f"size: expected a number with one of {', '.join(SCALES)} behind it, found {text!r}"
        )
    return int(float(found[1]) * SCALES[found[2]])


def parse_memory_budget(text: str, kv_bytes: int) -> SizeTarget:
    """``24GB gpu + 128GB ram, ctx 16384``: the file that runs there, the KV cache and all but the experts on the GPU.

    Buffers of computation come on top: name what is left for the model. Raises InputError for anything else.
    """
    found = FITS.fullmatch(text.strip())
    if not found:
        raise InputError(
            f"fits: expected a text like '24GB gpu + 128GB ram, ctx 16384', found {text!r}"
        )
    if found["only"]:
        return SizeTarget(parse_file_size(found["only"]) - kv_bytes * int(found["tokens"] or 0))
    cache = kv_bytes * int(found["context"] or 0)
    gpu = parse_file_size(found["gpu"]) - cache
    return SizeTarget(gpu + parse_file_size(found["ram"]), gpu) if found["ram"] else SizeTarget(gpu)


def make_bpw_target(material: AllocationInputs, per_weight: float) -> SizeTarget:
    """The file with so many bits per weight, over all weights and without its head."""
    return SizeTarget(
        int(per_weight * sum(t.elements for t in material.tensors) / 8) + material.head_bytes
    )


def _with_mtp(material: AllocationInputs, constraints: Constraints) -> Constraints:
    """The constraints and the types of MTP blocks; where a type is not among those to choose from, the smallest there."""
    if not constraints.mtp_pinned:
        return constraints
    behind = {name for name, depth in compute_depths(material.tensors).items() if depth >= 1}
    pinned = {}
    for name, by_type in material.trusted().errors.items():
        allowed = [kind for kind in by_type if kind not in constraints.excluded]
        if name in behind and allowed:
            wanted = MTP_JOINT if ".nextn." in name else MTP_REST
            smallest = min(allowed, key=lambda kind: TYPES[kind].bits_per_weight)
            pinned[re.escape(name)] = wanted if wanted in allowed else smallest
    return replace(constraints, pinned={**constraints.pinned, **pinned})


def _problems(material: AllocationInputs, constraints: Constraints) -> Iterator[str]:
    names = list(material.errors.errors)
    for pattern, kind in constraints.pinned.items():
        if kind not in TYPES:
            yield f"pin {pattern}={kind}: {kind} is not one of ggml's types"
        elif kind in constraints.excluded:
            yield f"pin {pattern}={kind}: {kind} is excluded; leave out one of the two"
        if not any(re.fullmatch(pattern, n) for n in names):
            yield f"pin {pattern}={kind}: no tensor of this model has such a name"
    if missing := sorted(set(names) - material.sensitivities.scales.keys()):
        some = f"{len(missing)} tensors are not in them, first {missing[0]}"
        yield f"sensitivities: of another model: {some}; or a part of the probes, to be merged"


def _size_problems(choices: Sequence[Unit], fixed: int, target: SizeTarget) -> Iterator[str]:
    least = fixed + sum(min(o.bytes for o in u.options) for u in choices)
    most = fixed + sum(max(o.bytes for o in u.options) for u in choices)
    if not least <= target.bytes:
        yield f"size: expected {least:,} to {most:,} bytes for these types, found {target.bytes:,}"
    elif target.bytes > most * 1.002:
        yield f"size: expected {least:,} to {most:,} bytes for these types, found {target.bytes:,}: the largest is reached"
