"""Search for a better allocation by building files and measuring their KLD.

Each round solves the knapsack for several perturbations of the sensitivities, has the new files
measured, and refits the sensitivities to all measured files. Every candidate is an exact solution,
so it keeps the budgets and constraints. The text is the probes' text, never the one that results
are judged by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quant.plan.allocate import Allocation, AllocationInputs, allocate_variant
from quant.plan.budgets import SizeTarget
from quant.plan.fit import refit_sensitivities
from quant.plan.sensitivity import Sensitivities
from quant.plan.units import Constraints

ROUND = 12
"""Files that are measured between two refits."""
WIDTH, NARROWING = 0.4, 0.8
"""Standard deviation of the perturbation of log scales in the first round, and its factor from
round to round."""
ATTEMPTS = 8
"""Perturbations for each new candidate; if none of them gives a new file, the search ends."""
# Fixed, so that the same inputs give the same files.
SEED = 11

Measure = Callable[[Sequence[Mapping[str, str]]], Sequence[float]]
"""Build and evaluate files, given by type per tensor; returns their KLDs in nats."""


@dataclass(frozen=True)
class SearchResult:
    """Where a search ended."""

    best: Allocation
    kld: float
    """Measured KLD of the best file in nats."""
    first_kld: float
    """Measured KLD of the solution that the search began with."""
    sensitivities: Sensitivities
    """Refitted to all measured files."""
    measured: tuple[tuple[Mapping[str, str], float], ...]
    """Types and KLD of every measured file."""


def search_allocations(
    inputs: AllocationInputs,
    target: SizeTarget,
    name: str,
    constraints: Constraints,
    measure: Measure,
    count: int,
) -> SearchResult:
    """Return the best of ``count`` measured files of at most a size.

    Args:
        inputs: What is known of the model.
        target: The size of the file.
        name: Name of the variant.
        constraints: What is allowed beside the size.
        measure: Builds and evaluates files.
        count: Files to measure; fewer are measured if no new ones are left.

    Raises:
        InputError: As ``quant.plan.allocate.allocate_variant``.
    """
    rng = np.random.default_rng(SEED)
    measured: dict[frozenset[tuple[str, str]], tuple[Allocation, float]] = {}
    refitted, width, first_kld = inputs.sensitivities, WIDTH, float("nan")
    while len(measured) < count:
        wanted = min(ROUND, count - len(measured))
        new: dict[frozenset[tuple[str, str]], Allocation] = {}
        for attempt in range(wanted * ATTEMPTS):
            # The first candidate of a round is the solution for the refitted sensitivities.
            scales = refitted if attempt == 0 else _perturb(refitted, width, rng)
            candidate = allocate_variant(
                replace(inputs, sensitivities=scales), target, name, constraints
            )
            key = frozenset(candidate.solution.types.items())
            if key not in measured:
                new.setdefault(key, candidate)
            if len(new) == wanted:
                break
        if not new:
            break
        klds = measure([candidate.solution.types for candidate in new.values()])
        first_kld = first_kld if measured else klds[0]
        measured.update({k: (a, kld) for (k, a), kld in zip(new.items(), klds, strict=True)})
        # Always refit the prior to all files: refitting a refit would count files twice.
        refitted = refit_sensitivities(
            inputs.sensitivities,
            [(a.solution.types, kld) for a, kld in measured.values()],
            inputs.errors,
            near=min(kld for _, kld in measured.values()),
        )
        width *= NARROWING
    # The least of many noisy figures is too low: a caller has to evaluate it on another text.
    best, kld = min(measured.values(), key=lambda pair: pair[1])
    predicted = refitted.predict_kld(best.solution.types, inputs.errors)
    # The solver's bound was for perturbed sensitivities; it says nothing of the measured KLD.
    solution = replace(best.solution, kld=predicted, bound=0.0)
    return SearchResult(
        best=replace(best, measured_kld=kld, solution=solution),
        kld=kld,
        first_kld=first_kld,
        sensitivities=refitted,
        measured=tuple((a.solution.types, kld) for a, kld in measured.values()),
    )


def _perturb(s: Sensitivities, width: float, rng: np.random.Generator) -> Sensitivities:
    """Return the sensitivities with every scale times a log-normal factor."""
    factors = np.exp(rng.normal(0, width, len(s.scales)))
    scales = {n: v * float(f) for (n, v), f in zip(s.scales.items(), factors, strict=True)}
    return replace(s, scales=scales)
