"""Choose the type of every tensor so that a file of a given size is as close to its base as can be. Pure.

A multiple-choice knapsack: every unit (a tensor, or gate and up of a layer) takes one of its types, the bytes stay within
the budgets, and the sum of the predicted divergences is the least. HiGHS solves it, and proves how far from the least
it may be: the gap.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from re import fullmatch

from quant.errors import InputError, raise_problems
from quant.llama.gguf import ALIGNMENT, TensorSpec, pad
from quant.llama.types import TYPES

BINS = 2**22
"""Of the budget; sizes are rounded up to them, so that a solution never exceeds it. A small file's bins are 32 bytes."""
SECONDS = 8.0
"""For one solution; the best that was found by then is taken, with its gap."""
GAP = 1e-4
"""At which the solver is content."""
EPSILON = 1e-12


@dataclass(frozen=True)
class Option:
    """One type for a unit."""

    type: str
    bytes: int
    """In the file, with padding."""
    damage: float
    """Predicted divergence."""


@dataclass(frozen=True)
class Unit:
    """Tensors that get one type together."""

    names: tuple[str, ...]
    group: str
    """The class, of which only so many types may be used."""
    options: tuple[Option, ...]
    all_useful: bool = False
    """An option that is beaten may still be taken: its type is there for others of the class."""

    @cached_property
    def useful(self) -> tuple[Option, ...]:
        """The options that no other beats, the smallest first."""
        if self.all_useful:
            return tuple(sorted(self.options, key=lambda o: (o.bytes, o.damage)))
        best: list[Option] = []
        for option in sorted(self.options, key=lambda o: (o.bytes, o.damage)):
            if not best or option.damage < best[-1].damage:
                best.append(option)
        return tuple(best)

    @property
    def least(self) -> int:
        """Bytes of its smallest type."""
        return self.useful[0].bytes

    @property
    def most(self) -> int:
        """Bytes of its best type."""
        return self.useful[-1].bytes


@dataclass(frozen=True)
class Budget:
    """Bytes that the tensors of whole names that match may take together."""

    name: str
    bytes: int
    tensors: str = ".*"

    def holds(self, unit: Unit) -> bool:
        """Whether the unit's bytes count."""
        return fullmatch(self.tensors, unit.names[0]) is not None


@dataclass(frozen=True)
class Constraints:
    """What an allocation has to keep to, beside its size; each can be switched off."""

    gate_up_alike: bool = True
    """gate and up of a layer share a type: kernels that compute both at once want it."""
    most_types: int | None = None
    """In one class of tensors."""
    mtp_pinned: bool = True
    """The MTP block gets types of its own: nothing that is measured shows its damage."""
    pinned: Mapping[str, str] = field(default_factory=dict)
    """Type by regular expression for whole names; the first that matches counts."""
    excluded: frozenset[str] = frozenset()
    """Types that are not used: what is slow on some machine."""
    ceiling: Mapping[str, str] = field(default_factory=dict)
    """By tensor, a type that it may not exceed in size: that of the next larger file of a ladder."""


SLOW = {
    "apple": frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}),
    "arm": frozenset(
        {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"}
    ),
    "cuda": frozenset({"IQ1_M"}),
}
"""Types that a kind of machine computes slowly: those that look their values up in large tables, and on CUDA the one that
llama.cpp has no kernel for multiplying with many tokens at once for."""


@dataclass(frozen=True)
class Solution:
    """An allocation, and how good it is."""

    types: Mapping[str, str]
    bytes: int
    """Of the units' tensors."""
    damage: float
    """Predicted divergence of the file."""
    bound: float
    """No allocation within the budgets has less."""

    @property
    def gap(self) -> float:
        """By how much the best possible could be better, as a share."""
        return max(self.damage - self.bound, 0) / max(self.damage, EPSILON)


def solve(
    units: Sequence[Unit], budgets: Sequence[Budget], most_types: int | None = None
) -> Solution:
    """The best types within the budgets, of which the first is for all units.

    Raises InputError when a budget is below the smallest possible, with both, or when no allocation keeps all of them.
    """
    raise_problems(_budget_problems(units, budgets))
    if most_types is not None:
        units = [replace(u, all_useful=True) for u in units]
    if (
        all(sum(u.most for u in units if b.holds(u)) <= b.bytes for b in budgets)
        and most_types is None
    ):
        chosen = [len(u.useful) - 1 for u in units]
        return _solution(units, chosen, bound=sum(u.useful[-1].damage for u in units))
    chosen, proven = _solved(units, budgets, most_types)
    if most_types is None:
        _fill(units, chosen, budgets)
    return _solution(units, chosen, max(proven, _lagrangian(units, budgets[0].bytes)))


def build_units(
    tensors: Sequence[TensorSpec],
    damage: Mapping[str, Mapping[str, float]],
    constraints: Constraints,
    group: Mapping[str, str],
) -> tuple[Unit, ...]:
    """The units of a model. ``damage`` is by tensor and type, ``group`` the class of each tensor.

    Raises InputError with every tensor for which the constraints leave no type.
    """
    specs = {t.name: t for t in tensors}
    found, problems = [], []
    for names in _together(damage, constraints):
        options = [
            Option(
                kind,
                sum(pad(TYPES[kind].bytes(specs[n].elements)) for n in names),
                sum(damage[n][kind] for n in names),
            )
            for kind in damage[names[0]]
            if all(kind in damage[n] and _allowed(kind, n, constraints) for n in names)
        ]
        if options:
            found.append(Unit(names, group[names[0]], tuple(options)))
        else:
            problems.append(_why_none(names[0], damage[names[0]], constraints))
    raise_problems(problems)
    return tuple(found)


def _together(damage: Mapping[str, object], constraints: Constraints) -> Iterator[tuple[str, ...]]:
    for name in damage:
        partner = name.replace("ffn_gate", "ffn_up")
        if not constraints.gate_up_alike or (partner not in damage and "ffn_up" not in name):
            yield (name,)
        elif partner != name and partner in damage:
            yield (name, partner)
        elif "ffn_up" not in name or name.replace("ffn_up", "ffn_gate") not in damage:
            yield (name,)


def _allowed(kind: str, name: str, constraints: Constraints) -> bool:
    pin = next((t for pattern, t in constraints.pinned.items() if fullmatch(pattern, name)), None)
    if pin is not None:
        return kind == pin
    ceiling = constraints.ceiling.get(name)
    below = ceiling is None or TYPES[kind].bits_per_weight <= TYPES[ceiling].bits_per_weight
    return below and kind not in constraints.excluded


def _why_none(name: str, known: Collection[str], constraints: Constraints) -> str:
    pin = next((t for pattern, t in constraints.pinned.items() if fullmatch(pattern, name)), None)
    if pin is not None:
        return (
            f"tensor {name}: pinned to {pin}, which it cannot have; possible are {', '.join(known)}"
        )
    return f"tensor {name}: no type is left of {', '.join(known)}: exclude fewer, or leave out the ladder's ceiling"


def _budget_problems(units: Sequence[Unit], budgets: Sequence[Budget]) -> Iterator[str]:
    for b in budgets:
        least = sum(u.least for u in units if b.holds(u))
        if least > b.bytes:
            most = sum(u.most for u in units if b.holds(u))
            yield f"{b.name}: expected at least {least:,} bytes of tensors (the most is {most:,}), found {b.bytes:,}"


def _solved(
    units: Sequence[Unit], budgets: Sequence[Budget], most_types: int | None
) -> tuple[list[int], float]:
    """The chosen option of each unit, and a proven bound of the damage (nothing where bins are coarse)."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    alike = _alike(units, budgets)
    kinds = [(n, o) for n, members in enumerate(alike) for o in units[members[0]].useful]
    used = sorted({(units[alike[n][0]].group, o.type) for n, o in kinds}) if most_types else []
    entries: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def row(values: Iterable[tuple[int, float]], least: float, most: float) -> None:
        entries.extend((len(low), column, value) for column, value in values)
        low.append(least)
        high.append(most)

    for n, members in enumerate(alike):
        row(((i, 1.0) for i, (m, _) in enumerate(kinds) if m == n), len(members), len(members))
    widths = [max(ALIGNMENT, -(-b.bytes // BINS)) for b in budgets]
    for b, width in zip(budgets, widths, strict=True):
        counted = [(i, o) for i, (n, o) in enumerate(kinds) if b.holds(units[alike[n][0]])]
        row(((i, float(-(-o.bytes // width))) for i, o in counted), 0, b.bytes // width)
    for j, (group, kind) in enumerate(used):
        of_kind = [
            i
            for i, (n, o) in enumerate(kinds)
            if (units[alike[n][0]].group, o.type) == (group, kind)
        ]
        row([*((i, 1.0) for i in of_kind), (len(kinds) + j, -float(len(units)))], -np.inf, 0)
    for group in sorted({g for g, _ in used}):
        row(
            ((len(kinds) + j, 1.0) for j, (g, _) in enumerate(used) if g == group),
            0,
            float(most_types or 0),
        )
    at, to, values = zip(*entries, strict=True)
    columns = len(kinds) + len(used)
    scale = 1 / max(_lagrangian(units, budgets[0].bytes), EPSILON)
    found = milp(
        np.array([*(o.damage for _, o in kinds), *(0.0 for _ in used)]) * scale,
        constraints=LinearConstraint(
            coo_array((values, (at, to)), (len(low), columns)).tocsr(), low, high
        ),
        bounds=Bounds(
            0, np.array([*(float(len(alike[n])) for n, _ in kinds), *(1.0 for _ in used)])
        ),
        integrality=np.ones(columns),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if found.x is None:
        raise InputError(
            f"no allocation keeps to all of {', '.join(b.name for b in budgets)}"
            + (f" and {most_types} types a class" if most_types else "")
            + "; allow more bytes or more types"
        )
    exact = all(width == ALIGNMENT for width in widths)
    return _handed_out(alike, kinds, found.x, len(units)), float(
        found.mip_dual_bound or 0
    ) / scale if exact else 0.0


def _alike(units: Sequence[Unit], budgets: Sequence[Budget]) -> list[list[int]]:
    """Units that cannot be told apart, which the solver counts and does not name: layers of a class, before they differ."""
    found: dict[object, list[int]] = {}
    for n, u in enumerate(units):
        found.setdefault((u.group, u.useful, tuple(b.holds(u) for b in budgets)), []).append(n)
    return list(found.values())


def _handed_out(
    alike: Sequence[Sequence[int]],
    kinds: Sequence[tuple[int, Option]],
    counts: Sequence[float],
    units: int,
) -> list[int]:
    """Which option each unit takes: those that are alike take them in order, so that a type holds a run of layers."""
    chosen = [0] * units
    taken = [0] * len(alike)
    option = [0] * len(alike)
    for (n, _), count in zip(kinds, counts, strict=False):
        for _ in range(round(count)):
            chosen[alike[n][taken[n]]] = option[n]
            taken[n] += 1
        option[n] += 1
    return chosen


def _fill(units: Sequence[Unit], chosen: list[int], budgets: Sequence[Budget]) -> None:
    """Take the bytes that rounding left: the best step for its size, as long as one fits."""
    free = {
        b: b.bytes
        - sum(u.useful[c].bytes for u, c in zip(units, chosen, strict=True) if b.holds(u))
        for b in budgets
    }
    while True:
        steps = [
            ((u.useful[c].damage - o.damage) / (o.bytes - u.useful[c].bytes), n, k)
            for n, (u, c) in enumerate(zip(units, chosen, strict=True))
            for k, o in enumerate(u.useful[c + 1 :], c + 1)
            if all(o.bytes - u.useful[c].bytes <= free[b] for b in budgets if b.holds(u))
        ]
        if not steps:
            return
        _, n, k = max(steps)
        for b in budgets:
            if b.holds(units[n]):
                free[b] -= units[n].useful[k].bytes - units[n].useful[chosen[n]].bytes
        chosen[n] = k


def _lagrangian(units: Sequence[Unit], budget: int) -> float:
    """The best bound that a price for bytes can prove."""
    import numpy as np

    width = max(len(u.useful) for u in units)
    sizes = np.array(
        [[o.bytes for o in u.useful] + [u.most] * (width - len(u.useful)) for u in units],
        float,
    )
    damages = np.array(
        [
            [o.damage for o in u.useful] + [u.useful[-1].damage] * (width - len(u.useful))
            for u in units
        ]
    )

    def at(price: float) -> tuple[float, float]:
        costs = damages + price * sizes
        pick = costs.argmin(1)[:, None]
        taken = float(np.take_along_axis(sizes, pick, 1).sum())
        return float(costs.min(1).sum() - price * budget), taken

    low, high = 0.0, 1.0
    while at(high)[1] > budget and high < 1e30:
        high *= 4
    best = max(at(low)[0], at(high)[0])
    for _ in range(200):
        middle = (low + high) / 2
        value, taken = at(middle)
        best = max(best, value)
        low, high = (middle, high) if taken > budget else (low, middle)
    return best


def _solution(units: Sequence[Unit], chosen: Sequence[int], bound: float) -> Solution:
    picked = [u.useful[c] for u, c in zip(units, chosen, strict=True)]
    types = {name: o.type for u, o in zip(units, picked, strict=True) for name in u.names}
    return Solution(types, sum(o.bytes for o in picked), sum(o.damage for o in picked), bound)
