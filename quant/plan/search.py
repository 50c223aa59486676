"""Look for a better allocation by building files and measuring them: what sums of single errors cannot tell.

Each round solves the knapsack for several guesses at the scales, has the files measured that are new, and mends the scales
by all files that were measured. So every candidate keeps to the budgets and the constraints, and a round costs as many
files as it may. The text is the sensitivities', never the one that results are judged by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quant.plan.budgets import Allocation, AllocationInputs, SizeTarget, allocate_variant
from quant.plan.sensitivity import Sensitivities, refit_sensitivities
from quant.plan.solver import Constraints

ROUND = 12
"""Files that are measured before the scales are mended."""
WIDTH, NARROWING = 0.4, 0.8
"""How far the logarithms of scales are moved to find a candidate in the first round, and how much less in each that follows."""
GUESSES = 8
"""For each new candidate at most; where as many find nothing new, the search ends."""
SEED = 11

Measure = Callable[[Sequence[Mapping[str, str]]], Sequence[float]]
"""Files by the types of their tensors, built and read: their divergences."""


@dataclass(frozen=True)
class SearchResult:
    """Where a search ended."""

    best: Allocation
    kld: float
    """Of the best, as measured."""
    first_kld: float
    """Of the solution that the search began with."""
    sensitivities: Sensitivities
    """Mended by all files."""
    measured: tuple[tuple[Mapping[str, str], float], ...]
    """Every file."""


def search_allocations(
    material: AllocationInputs,
    target: SizeTarget,
    name: str,
    summary: str,
    constraints: Constraints,
    measure: Measure,
    count: int,
    known: Sequence[tuple[Mapping[str, str], float]] = (),
) -> SearchResult:
    """The best of ``count`` files of at most that size, which are measured; ``known`` were measured before.

    Raises InputError as :func:`quant.plan.budgets.allocate_variant`.
    """
    rng = np.random.default_rng(SEED)
    tried: dict[frozenset[tuple[str, str]], tuple[Allocation, float]] = {}
    mended, width, first = material.sensitivities, WIDTH, float("nan")
    while len(tried) < count:
        room = min(ROUND, count - len(tried))
        new: dict[frozenset[tuple[str, str]], Allocation] = {}
        for guess in range(room * GUESSES):
            scales = mended if guess == 0 else _moved(mended, width, rng)
            made = allocate_variant(
                replace(material, sensitivities=scales), target, name, summary, constraints
            )
            key = frozenset(made.solution.types.items())
            if key not in tried:
                new.setdefault(key, made)
            if len(new) == room:
                break
        if not new:
            break
        klds = measure([made.solution.types for made in new.values()])
        first = first if tried else klds[0]
        tried.update({key: (made, kld) for (key, made), kld in zip(new.items(), klds, strict=True)})
        whole = [*known, *((made.solution.types, kld) for made, kld in tried.values())]
        mended = refit_sensitivities(
            material.sensitivities,
            whole,
            material.errors,
            near=min(kld for _, kld in tried.values()),
        )
        width *= NARROWING
    best, kld = min(tried.values(), key=lambda pair: pair[1])
    told = mended.predicted(best.solution.types, material.errors)
    best = replace(best, measured=kld, solution=replace(best.solution, damage=told, bound=0.0))
    seen = tuple((made.solution.types, kld) for made, kld in tried.values())
    return SearchResult(best, kld, first, mended, seen)


def _moved(found: Sensitivities, width: float, rng: np.random.Generator) -> Sensitivities:
    by = np.exp(rng.normal(0, width, len(found.scales)))
    return replace(
        found, scales={n: v * float(f) for (n, v), f in zip(found.scales.items(), by, strict=True)}
    )
