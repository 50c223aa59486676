"""The solver: never above a budget, as good as trying everything, with a bound that holds."""

import itertools
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.core.errors import InputError
from quant.plan.solver import solve
from quant.plan.units import Budget, Option, Unit

KINDS = ("IQ2_XXS", "IQ3_S", "Q4_K", "Q6_K")


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Unit], int]:
    """Up to five units of two classes, and a budget between the smallest and the largest size."""
    units = []
    for n in range(draw(st.integers(1, 5))):
        sizes = sorted(draw(st.lists(st.integers(1, 60), min_size=2, max_size=4, unique=True)))
        losses = st.lists(st.floats(1e-6, 1.0), min_size=len(sizes), max_size=len(sizes))
        klds = sorted(draw(losses), reverse=True)
        options = [Option(k, 32 * s, d) for k, s, d in zip(KINDS, sizes, klds, strict=False)]
        units.append(Unit((f"blk.{n}.x.weight",), draw(st.sampled_from("ab")), tuple(options)))
    least, most = sum(u.min_bytes for u in units), sum(u.options[-1].bytes for u in units)
    return units, draw(st.integers(least, most + 64))


def try_everything(units: Sequence[Unit], budget: int, most_types: int | None = None) -> float:
    best = float("inf")
    for options in itertools.product(*(u.options for u in units)):
        kinds: dict[str, set[str]] = {}
        for u, o in zip(units, options, strict=True):
            kinds.setdefault(u.tensor_class, set()).add(o.type)
        few = not most_types or max(map(len, kinds.values())) <= most_types
        if sum(o.bytes for o in options) <= budget and few:
            best = min(best, sum(o.kld for o in options))
    return best


@given(problems())
@settings(max_examples=60)
def test_it_is_as_good_as_trying_everything_and_never_above_its_budget(
    problem: tuple[list[Unit], int],
) -> None:
    units, budget = problem
    solution = solve(units, [Budget("size", budget)])
    assert solution.bytes <= budget
    best = try_everything(units, budget)
    assert best * (1 - 1e-9) <= solution.kld <= best * (1 + 2e-4) + 1e-9
    assert solution.bound <= best * (1 + 1e-6) + 1e-9
    assert solution.gap <= 1e-3 or solution.kld < 1e-6


@given(problems())
@settings(max_examples=30)
def test_with_one_type_a_class_every_class_has_one(problem: tuple[list[Unit], int]) -> None:
    units, budget = problem
    best = try_everything(units, budget, most_types=1)
    if best == float("inf"):
        with pytest.raises(InputError, match="1 types a class; allow more"):
            solve(units, [Budget("size", budget)], most_types=1)
        return
    solution = solve(units, [Budget("size", budget)], most_types=1)
    for name in "ab":
        assert len({solution.types[u.names[0]] for u in units if u.tensor_class == name}) <= 1
    assert solution.kld <= best * (1 + 2e-4) + 1e-9


def test_a_second_budget_limits_its_own_tensors() -> None:
    options = tuple(Option(k, 32 * n, 1 / n) for n, k in enumerate(KINDS, 1))
    units = [
        Unit((f"blk.{n}.{kind}.weight",), kind, options)
        for n in range(4)
        for kind in ("attn", "exps")
    ]
    budgets = [Budget("all", 32 * 24), Budget("attention", 32 * 5, r".*attn.*")]
    solution = solve(units, budgets)
    by_type = {o.type: o.bytes for o in options}
    sizes = {name: by_type[kind] for name, kind in solution.types.items()}
    assert sum(size for name, size in sizes.items() if "attn" in name) <= 32 * 5
    assert sum(sizes.values()) <= 32 * 24


def test_equal_layers_get_their_types_in_runs() -> None:
    options = (Option("IQ2_XXS", 32, 1.0), Option("Q4_K", 64, 0.1))
    units = [Unit((f"blk.{n}.x.weight",), "x", options) for n in range(10)]
    solution = solve(units, [Budget("size", 32 * 14)])
    assert list(solution.types.values()) == ["IQ2_XXS"] * 6 + ["Q4_K"] * 4


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_and_the_largest() -> None:
    units = [Unit(("a.weight",), "a", (Option("Q4_K", 320, 1.0), Option("Q6_K", 640, 0.1)))]
    message = "size: expected at least 320 bytes of tensors (the most is 640), found 300"
    with pytest.raises(InputError, match=re.escape(message)):
        solve(units, [Budget("size", 300)])
