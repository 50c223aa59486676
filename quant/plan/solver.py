"""Choose the type of every tensor so that a file of a given size has the least predicted KLD. Pure.

This is a multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004,
chapter 11). With x_uo = 1 if unit u takes option o:

    minimize   Σ kld_uo · x_uo
    subject to Σ_o x_uo = 1 for every unit,  Σ bytes_uo · x_uo ≤ B for every budget

HiGHS (through scipy.optimize.milp) solves it by branch and bound and proves a lower bound, from
which the gap follows. The rejected alternative, one price for all bytes (the Lagrangian bound below
as a heuristic), leaves up to 2.5 % of a small file unused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from quant.core.errors import InputError, raise_problems
from quant.llama.gguf import ALIGNMENT
from quant.plan.units import Budget, Option, Unit

BINS = 2**22
"""Most bins that a budget is divided into.

Sizes are rounded up to bins of at least 32 bytes, so that a solution never exceeds the budget. Byte
counts of 10^11 as coefficients would be beyond the solver's tolerances.
"""
SECONDS = 8.0
"""Time limit of one solution. The best one until then is used, with its gap."""
GAP = 1e-4
"""Relative gap at which the solver stops."""
EPSILON = 1e-12
BISECTIONS = 200
"""Steps that determine the multiplier of the Lagrangian bound to the last bit."""


@dataclass(frozen=True)
class Solution:
    """An allocation, and how good it is."""

    types: Mapping[str, str]
    """Type by tensor."""
    bytes: int
    """Bytes of the units' tensors."""
    kld: float
    """Predicted KLD of the file in nats."""
    bound: float
    """Lower bound: no allocation within the budgets has less KLD."""

    @property
    def gap(self) -> float:
        """Relative gap: the fraction of the KLD that the best possible allocation might save."""
        return max(self.kld - self.bound, 0) / max(self.kld, EPSILON)


def solve(
    units: Sequence[Unit], budgets: Sequence[Budget], most_types: int | None = None
) -> Solution:
    """Return the types with the least KLD within the budgets.

    Args:
        units: What to choose types for.
        budgets: Byte limits; the first one is for all units.
        most_types: Maximum number of types in a class of tensors.

    Raises:
        InputError: A budget is below the smallest possible size, or no allocation keeps all limits.
    """
    raise_problems(_find_budget_problems(units, budgets))
    if most_types is not None:
        # A dominated option may be needed: its type may be one of the few of the class.
        units = [replace(u, keep_dominated=True) for u in units]
    elif all(sum(u.max_bytes for u in units if b.counts(u)) <= b.bytes for b in budgets):
        # Every unit can have its best type, so there is nothing to solve.
        best = [len(u.undominated) - 1 for u in units]
        return _make_solution(units, best, bound=sum(u.undominated[-1].kld for u in units))
    chosen, dual_bound = _solve_milp(units, budgets, most_types)
    # Filling heeds bytes only. It could bring a class one type more than allowed.
    if most_types is None:
        _fill_budgets(units, chosen, budgets)
    # Both are lower bounds. Without the other budgets the Lagrangian one is still valid: fewer
    # limits allow no more KLD.
    bound = max(dual_bound, _compute_lagrangian_bound(units, budgets[0].bytes))
    return _make_solution(units, chosen, bound)


def _find_budget_problems(units: Sequence[Unit], budgets: Sequence[Budget]) -> Iterator[str]:
    for b in budgets:
        least = sum(u.min_bytes for u in units if b.counts(u))
        if least > b.bytes:
            most = sum(u.max_bytes for u in units if b.counts(u))
            yield (
                f"{b.name}: expected at least {least:,} bytes of tensors (the most is {most:,}),"
                f" found {b.bytes:,}"
            )


@dataclass
class _Rows:
    """Rows of a sparse constraint matrix: lower ≤ Σ value · column ≤ upper."""

    entries: list[tuple[int, int, float]] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, values: Iterable[tuple[int, float]], lower: float, upper: float) -> None:
        self.entries.extend((len(self.lower), column, value) for column, value in values)
        self.lower.append(lower)
        self.upper.append(upper)


def _solve_milp(
    units: Sequence[Unit], budgets: Sequence[Budget], most_types: int | None
) -> tuple[list[int], float]:
    """Return the chosen option of each unit, and a lower bound of the KLD; 0 if bins are coarse."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    # Indistinguishable units are one group with integer counts instead of 0/1 variables: the layers
    # of a class are symmetric, and symmetry is what makes branch and bound slow.
    groups = _group_equal_units(units, budgets)
    # One integer column for each option of each group: how many units of the group take it.
    columns = [(n, o) for n, members in enumerate(groups) for o in units[members[0]].undominated]
    rows = _Rows()
    for n, members in enumerate(groups):
        ones = ((i, 1.0) for i, (group, _) in enumerate(columns) if group == n)
        rows.add(ones, len(members), len(members))
    # Padded sizes are multiples of ALIGNMENT: bins of that width round nothing.
    widths = [max(ALIGNMENT, -(-b.bytes // BINS)) for b in budgets]
    for b, width in zip(budgets, widths, strict=True):
        counted = [(i, o) for i, (n, o) in enumerate(columns) if b.counts(units[groups[n][0]])]
        rows.add(((i, float(-(-o.bytes // width))) for i, o in counted), 0, b.bytes // width)
    # One 0/1 column for each type of a class: whether it is used at all.
    class_of = [units[members[0]].tensor_class for members in groups]
    used = sorted({(class_of[n], o.type) for n, o in columns}) if most_types else []
    for j, of_class in enumerate(used, len(columns)):
        same = [(i, 1.0) for i, (n, o) in enumerate(columns) if (class_of[n], o.type) == of_class]
        rows.add([*same, (j, -float(len(units)))], -np.inf, 0)  # big-M: used or count is 0
    for name in sorted({c for c, _ in used}):
        ones = ((j, 1.0) for j, (c, _) in enumerate(used, len(columns)) if c == name)
        rows.add(ones, 0, float(most_types or 0))
    at, to, values = zip(*rows.entries, strict=True)
    shape = (len(rows.lower), len(columns) + len(used))
    matrix = coo_array((values, (at, to)), shape).tocsr()
    most = [*(float(len(groups[n])) for n, _ in columns), *(1.0 for _ in used)]
    # Scaled so that the optimum is about 1: KLDs of 1e-5 would drown in HiGHS's tolerances.
    scale = 1 / max(_compute_lagrangian_bound(units, budgets[0].bytes), EPSILON)
    result = milp(
        np.array([*(o.kld for _, o in columns), *(0.0 for _ in used)]) * scale,
        constraints=LinearConstraint(matrix, rows.lower, rows.upper),
        bounds=Bounds(0, np.array(most)),
        integrality=np.ones(shape[1]),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if result.x is None:
        raise InputError(
            f"no allocation keeps to all of {', '.join(b.name for b in budgets)}"
            + (f" and {most_types} types a class" if most_types else "")
            + "; allow more bytes or more types"
        )
    # Rounding sizes up to wider bins may cut the optimum off; then HiGHS's bound proves nothing.
    exact = all(width == ALIGNMENT for width in widths)
    bound = float(result.mip_dual_bound or 0) / scale if exact else 0.0
    return _assign_options(groups, columns, result.x, len(units)), bound


def _group_equal_units(units: Sequence[Unit], budgets: Sequence[Budget]) -> list[list[int]]:
    """Return the indices of units by class, options and budgets that they count against."""
    groups: dict[object, list[int]] = {}
    for n, u in enumerate(units):
        key = (u.tensor_class, u.undominated, tuple(b.counts(u) for b in budgets))
        groups.setdefault(key, []).append(n)
    return list(groups.values())


def _assign_options(
    groups: Sequence[Sequence[int]],
    columns: Sequence[tuple[int, Option]],
    counts: Sequence[float],
    units: int,
) -> list[int]:
    """Return the option of each unit."""
    chosen = [0] * units
    assigned = [0] * len(groups)  # units of each group that have an option
    option = [0] * len(groups)  # index of the option whose count is next
    # In order, so that each type is one run of layers, which folds into one rule. Behind the
    # options' counts stand the 0/1 columns, which zip leaves out.
    for (n, _), count in zip(columns, counts, strict=False):
        # HiGHS's integers are integers within its tolerance.
        for _ in range(round(count)):
            chosen[groups[n][assigned[n]]] = option[n]
            assigned[n] += 1
        option[n] += 1
    return chosen


def _fill_budgets(units: Sequence[Unit], chosen: list[int], budgets: Sequence[Budget]) -> None:
    """Spend the bytes that rounding to bins left: greedily the best gain per byte that fits."""
    free = {
        b: b.bytes
        - sum(u.undominated[c].bytes for u, c in zip(units, chosen, strict=True) if b.counts(u))
        for b in budgets
    }
    while True:
        steps = [
            # Undominated options grow in bytes, so that no step divides by zero.
            ((u.undominated[c].kld - o.kld) / (o.bytes - u.undominated[c].bytes), n, k)
            for n, (u, c) in enumerate(zip(units, chosen, strict=True))
            for k, o in enumerate(u.undominated[c + 1 :], c + 1)
            if all(o.bytes - u.undominated[c].bytes <= free[b] for b in budgets if b.counts(u))
        ]
        if not steps:
            return
        _, n, k = max(steps)
        options = units[n].undominated
        for b in budgets:
            if b.counts(units[n]):
                free[b] -= options[k].bytes - options[chosen[n]].bytes
        chosen[n] = k


def _compute_lagrangian_bound(units: Sequence[Unit], budget: int) -> float:
    """Return the best lower bound of the KLD that one price for bytes proves.

    For every multiplier λ ≥ 0, L(λ) = Σ_u min_o (kld_uo + λ · bytes_uo) − λ · B is at most the
    optimum (weak duality). L is concave, and its minimizers take fewer bytes as λ grows: bisection
    finds the λ whose bytes meet the budget. It is exact in bytes, where HiGHS sees only bins.
    """
    import numpy as np

    # Options padded to one length by repeating each unit's last.
    padded = max(len(u.undominated) for u in units)
    options = [[*u.undominated, *u.undominated[-1:] * (padded - len(u.undominated))] for u in units]
    sizes = np.array([[o.bytes for o in row] for row in options], float)
    klds = np.array([[o.kld for o in row] for row in options])

    def evaluate(multiplier: float) -> tuple[float, float]:
        costs = klds + multiplier * sizes
        pick = costs.argmin(1)[:, None]
        used_bytes = float(np.take_along_axis(sizes, pick, 1).sum())
        return float(costs.min(1).sum() - multiplier * budget), used_bytes

    low, high = 0.0, 1.0
    while evaluate(high)[1] > budget and high < 1e30:
        high *= 4
    best = max(evaluate(low)[0], evaluate(high)[0])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        bound, used_bytes = evaluate(middle)
        best = max(best, bound)
        low, high = (middle, high) if used_bytes > budget else (low, middle)
    return best


def _make_solution(units: Sequence[Unit], chosen: Sequence[int], bound: float) -> Solution:
    picked = [u.undominated[c] for u, c in zip(units, chosen, strict=True)]
    return Solution(
        types={name: o.type for u, o in zip(units, picked, strict=True) for name in u.names},
        bytes=sum(o.bytes for o in picked),
        kld=sum(o.kld for o in picked),
        bound=bound,
    )
