"""Allocate types to tensors for files of given sizes. Pure.

``quant.evaluate.allocation`` measures what goes in, and calls this.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quant.core.errors import raise_problems
from quant.llama.gguf import Header, TensorSpec, pad
from quant.llama.tensors import EXPERTS
from quant.llama.types import TYPES
from quant.plan.budgets import SizeTarget
from quant.plan.error_table import ErrorTable
from quant.plan.fold import fold_types
from quant.plan.plan import CoveragePolicy, Plan, compute_depths, make_plan
from quant.plan.recipe import Variant
from quant.plan.sensitivity import Sensitivities
from quant.plan.sizes import forecast_file_bytes
from quant.plan.solver import Solution, solve
from quant.plan.units import Budget, Constraints, Unit, build_units

MTP_PROJECTION, MTP_REST = "Q5_K", "Q2_K"
"""Types of MTP blocks: what joins the block to the trunk, and the rest.

Both need no imatrix, which has no data for MTP blocks. They only draft tokens, so an error costs
speed and no text.
"""
MAX_ITERATIONS = 8
CONVERGED = 1e-3
"""Relative change of the error sum at which the iteration stops."""
# Only a start: the error sum of each solution replaces it.
INITIAL_ERROR = 0.02
"""Error sum at which the KLD is linearized first."""
MAX_OVERSHOOT = 1.002
"""A target may be this factor above the largest possible file; more is an error of who asks."""


@dataclass(frozen=True)
class AllocationInputs:
    """What is known of a model when types are allocated."""

    tensors: tuple[TensorSpec, ...]
    """All tensors of the BF16 file."""
    covered: frozenset[str]
    """Names of the tensors with imatrix data."""
    errors: ErrorTable
    """Quantization errors, measured or typical."""
    sensitivities: Sensitivities
    """Fitted to probes, or priors."""
    head_bytes: int
    """Bytes before the tensors, about; exact where ``base`` is given."""
    base: Header | None = None
    """Head of the BF16 file, with which sizes are exact."""
    imatrix: Header | None = None
    """Head of the imatrix."""
    kv_bytes: int = 0
    """Bytes of KV cache for one token of context."""
    policy: CoveragePolicy | None = None
    """Tensors with insufficient imatrix coverage, which get no type below a floor."""

    def allowed_errors(self) -> ErrorTable:
        """Return the error table without the types that the coverage policy forbids."""
        if not self.policy or self.policy.otherwise == "report":
            return self.errors
        specs, forbids = {t.name: t for t in self.tensors}, self.policy.applies_to
        errors = {
            name: {kind: e for kind, e in by_type.items() if not forbids(specs[name], TYPES[kind])}
            for name, by_type in self.errors.errors.items()
        }
        return replace(self.errors, errors=errors)

    def forecast_bytes(self, plan: Plan) -> int:
        """Return the length of a plan's whole file in bytes."""
        if self.base:
            return forecast_file_bytes(plan, self.base, self.imatrix)
        return self.head_bytes + plan.bytes

    def compute_fixed_bytes(self) -> int:
        """Return the bytes of a file without the tensors that types are allocated to."""
        # Any types would do: the head and the other tensors are the same for all.
        types = {
            name: min(kinds, key=lambda k: TYPES[k].bits_per_weight)
            for name, kinds in self.errors.errors.items()
        }
        plan = make_plan(
            fold_types("smallest", "", types, self.tensors), self.tensors, self.covered
        )
        allocated = sum(pad(t.bytes) for t in plan.tensors if t.tensor.name in types)
        return self.forecast_bytes(plan) - allocated


@dataclass(frozen=True)
class Allocation:
    """A variant that was allocated for a size."""

    variant: Variant
    target: SizeTarget
    solution: Solution
    bytes: int
    """Bytes of the whole file."""
    measured_kld: float | None = None
    """KLD on calibration text in nats, where the file was built and evaluated."""

    def json(self) -> dict[str, Any]:
        """Return the allocation as ``quant allocate --json`` prints it."""
        measured = self.measured_kld
        return {
            "name": self.variant.name,
            "target": self.target.bytes,
            "bytes": self.bytes,
            "kld_predicted": self.solution.kld,
            "kld_measured": measured,
            "gap": self.solution.gap if measured is None else None,
            "rules": len(self.variant.rules),
        }


Allocator = Callable[[AllocationInputs, SizeTarget, str, Constraints], Allocation]
"""``allocate_variant``, or a search with the same arguments."""


def allocate_variant(
    inputs: AllocationInputs, target: SizeTarget, name: str, constraints: Constraints
) -> Allocation:
    """Return the variant of at most a size with the least predicted KLD.

    Args:
        inputs: What is known of the model.
        target: The size of the file.
        name: Name of the variant.
        constraints: What is allowed beside the size.

    Raises:
        InputError: The size is out of reach (with the smallest and largest possible), or the
            constraints contradict each other.
    """
    raise_problems(_find_input_problems(inputs, constraints))
    fixed, constraints = inputs.compute_fixed_bytes(), _pin_mtp_blocks(inputs, constraints)
    solution = _solve_iteratively(inputs, target, constraints, fixed)
    summary = f"Allocated for {target.bytes:,} bytes."
    variant = fold_types(name, summary, solution.types, inputs.tensors)
    plan = make_plan(variant, inputs.tensors, inputs.covered)
    types = {t.tensor.name: t.type.name for t in plan.tensors if t.tensor.name in solution.types}
    # The rules are published, not the types: they have to plan what was solved.
    assert types == dict(solution.types), "folding lost a type"
    return Allocation(variant, target, solution, inputs.forecast_bytes(plan))


def allocate_ladder(
    inputs: AllocationInputs,
    targets: Mapping[str, SizeTarget],
    constraints: Constraints,
    *,
    monotone: bool = True,
    allocator: Allocator = allocate_variant,
) -> tuple[Allocation, ...]:
    """Return variants for several sizes, the largest first.

    Args:
        inputs: What is known of the model.
        targets: Size by name of the variant.
        constraints: What is allowed beside the sizes.
        monotone: No tensor of a smaller file gets a larger type than in the next larger file.
        allocator: What allocates one variant.

    Raises:
        InputError: As ``allocate_variant``.
    """
    allocations: list[Allocation] = []
    # The largest first: its types are the ceiling of the next one.
    for name, target in sorted(targets.items(), key=lambda item: -item[1].bytes):
        limits = constraints
        if allocations and monotone:
            limits = replace(constraints, ceiling=allocations[-1].solution.types)
        allocations.append(allocator(inputs, target, name, limits))
    return tuple(allocations)


def check_target(inputs: AllocationInputs, target: SizeTarget, constraints: Constraints) -> None:
    """Raise what ``allocate_variant`` would raise of a size or constraints, before any probing."""
    raise_problems(_find_input_problems(inputs, constraints))
    klds = {n: dict.fromkeys(kinds, 1.0) for n, kinds in inputs.allowed_errors().errors.items()}
    units = build_units(inputs.tensors, klds, _pin_mtp_blocks(inputs, constraints))
    raise_problems(_find_size_problems(units, inputs.compute_fixed_bytes(), target))


def _solve_iteratively(
    inputs: AllocationInputs, target: SizeTarget, constraints: Constraints, fixed: int
) -> Solution:
    """Solve with the KLD linearized, linearize at the solution, and repeat until it is stable."""
    sensitivities, errors = inputs.sensitivities, inputs.allowed_errors()
    amplified, best = INITIAL_ERROR, None
    # The KLD is a power of a sum, the knapsack linear. If the power is above 1 (convex), a fixed
    # point is optimal: the solution minimizes the tangent at itself. Below 1 (concave) it is the
    # optimum for one ratio of amplified to additive errors, so the best iterate counts, not the
    # last.
    for _ in range(MAX_ITERATIONS):
        klds = sensitivities.linearize(errors, amplified)
        units = build_units(inputs.tensors, klds, constraints)
        raise_problems(_find_size_problems(units, fixed, target))
        solution = solve(units, _make_budgets(target, fixed), constraints.most_types)
        kld = sensitivities.predict_kld(solution.types, errors)
        if best is None or kld < best.kld:
            # The relative gap of the linear problem stands for that of the predicted KLD.
            best = replace(solution, kld=kld, bound=kld * (1 - solution.gap))
        actual = sensitivities.sum_errors(solution.types, errors)[0]
        # With power 1 the KLD is linear already.
        if sensitivities.power == 1 or abs(actual / amplified - 1) < CONVERGED:
            break
        amplified = actual
    assert best
    return best


def _make_budgets(target: SizeTarget, fixed: int) -> list[Budget]:
    budgets = [Budget(f"a file of {target.bytes:,} bytes", target.bytes - fixed)]
    if target.rest_bytes is not None:
        rest = rf"(?!{EXPERTS.pattern}).*"
        # The head and tensors that keep their type lie on the accelerator too.
        budgets.append(
            Budget("everything but experts, on the accelerator", target.rest_bytes - fixed, rest)
        )
    return budgets


def _pin_mtp_blocks(inputs: AllocationInputs, constraints: Constraints) -> Constraints:
    """Return the constraints with fixed types for MTP blocks."""
    if not constraints.mtp_pinned:
        return constraints
    mtp = {name for name, depth in compute_depths(inputs.tensors).items() if depth >= 1}
    pinned = {}
    for name, by_type in inputs.allowed_errors().errors.items():
        allowed = [kind for kind in by_type if kind not in constraints.excluded]
        if name in mtp and allowed:
            wanted = MTP_PROJECTION if ".nextn." in name else MTP_REST
            # The fixed type may be excluded, or its blocks may not fit the rows.
            smallest = min(allowed, key=lambda kind: TYPES[kind].bits_per_weight)
            pinned[re.escape(name)] = wanted if wanted in allowed else smallest
    # The user's pins come first, because the first match counts.
    return replace(constraints, pinned={**constraints.pinned, **pinned})


def _find_input_problems(inputs: AllocationInputs, constraints: Constraints) -> Iterator[str]:
    names = list(inputs.errors.errors)
    for pattern, kind in constraints.pinned.items():
        if kind not in TYPES:
            yield f"pin {pattern}={kind}: {kind} is not one of ggml's types"
        elif kind in constraints.excluded:
            yield f"pin {pattern}={kind}: {kind} is excluded; leave out one of the two"
        if not any(re.fullmatch(pattern, n) for n in names):
            yield f"pin {pattern}={kind}: no tensor of this model has such a name"
    if missing := sorted(set(names) - inputs.sensitivities.scales.keys()):
        yield (
            f"sensitivities: of another model: {len(missing)} tensors are not in them, first"
            f" {missing[0]}; or a part of the probes, to be merged"
        )


def _find_size_problems(units: Sequence[Unit], fixed: int, target: SizeTarget) -> Iterator[str]:
    least = fixed + sum(min(o.bytes for o in u.options) for u in units)
    most = fixed + sum(max(o.bytes for o in u.options) for u in units)
    message = f"size: expected {least:,} to {most:,} bytes for these types, found {target.bytes:,}"
    if target.bytes < least:
        yield message
    elif target.bytes > most * MAX_OVERSHOOT:
        yield f"{message}: the largest is reached"
