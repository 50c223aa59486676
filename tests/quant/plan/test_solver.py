"""The allocator: never above a budget, as good as trying everything, and honest about the rest."""

import itertools
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import InputError
from quant.llama.gguf import TensorSpec, pad
from quant.llama.types import TYPES
from quant.plan.solver import Budget, Constraints, Option, Unit, build_units, solve

KINDS = ("IQ2_XXS", "IQ3_S", "Q4_K", "Q6_K")


@st.composite
def problem(draw: st.DrawFn) -> tuple[list[Unit], int]:
    made = []
    for n in range(draw(st.integers(1, 5))):
        sizes = sorted(draw(st.lists(st.integers(1, 60), min_size=2, max_size=4, unique=True)))
        damages = sorted(
            draw(st.lists(st.floats(1e-6, 1.0), min_size=len(sizes), max_size=len(sizes))),
            reverse=True,
        )
        options = [Option(k, 32 * s, d) for k, s, d in zip(KINDS, sizes, damages, strict=False)]
        made.append(Unit((f"blk.{n}.x.weight",), draw(st.sampled_from("ab")), tuple(options)))
    least, most = sum(u.least for u in made), sum(u.options[-1].bytes for u in made)
    return made, draw(st.integers(least, most + 64))


def brute_force(made: Sequence[Unit], fits: int, most_types: int | None = None) -> float:
    best = float("inf")
    for options in itertools.product(*(u.options for u in made)):
        kinds: dict[str, set[str]] = {}
        for u, o in zip(made, options, strict=True):
            kinds.setdefault(u.group, set()).add(o.type)
        if sum(o.bytes for o in options) <= fits and (
            not most_types or max(map(len, kinds.values())) <= most_types
        ):
            best = min(best, sum(o.damage for o in options))
    return best


@given(problem())
@settings(max_examples=60)
def test_it_is_as_good_as_trying_everything_and_never_above_its_budget(
    case: tuple[list[Unit], int],
) -> None:
    made, fits = case
    found = solve(made, [Budget("size", fits)])
    assert found.bytes <= fits
    best = brute_force(made, fits)
    assert best * (1 - 1e-9) <= found.damage <= best * (1 + 2e-4) + 1e-9
    assert found.bound <= best * (1 + 1e-6) + 1e-9
    assert found.gap <= 1e-3 or found.damage < 1e-6


@given(problem())
@settings(max_examples=30)
def test_with_one_type_a_class_every_class_has_one(case: tuple[list[Unit], int]) -> None:
    made, fits = case
    best = brute_force(made, fits, most_types=1)
    if best == float("inf"):
        with pytest.raises(InputError, match="1 types a class; allow more"):
            solve(made, [Budget("size", fits)], most_types=1)
        return
    found = solve(made, [Budget("size", fits)], most_types=1)
    for group in "ab":
        assert len({found.types[u.names[0]] for u in made if u.group == group}) <= 1
    assert found.damage <= best * (1 + 2e-4) + 1e-9


def test_a_second_budget_holds_for_its_own_tensors() -> None:
    options = tuple(Option(k, 32 * n, 1 / n) for n, k in enumerate(KINDS, 1))
    made = [
        Unit((f"blk.{n}.{kind}.weight",), kind, options)
        for n in range(4)
        for kind in ("attn", "exps")
    ]
    found = solve(made, [Budget("all", 32 * 24), Budget("attention", 32 * 5, r".*attn.*")])
    sizes = {
        u.names[0]: next(o.bytes for o in options if o.type == found.types[u.names[0]])
        for u in made
    }
    assert sum(size for name, size in sizes.items() if "attn" in name) <= 32 * 5
    assert sum(sizes.values()) <= 32 * 24


def test_layers_that_are_alike_share_out_their_types_in_runs() -> None:
    options = (Option("IQ2_XXS", 32, 1.0), Option("Q4_K", 64, 0.1))
    made = [Unit((f"blk.{n}.x.weight",), "x", options) for n in range(10)]
    found = solve(made, [Budget("size", 32 * 14)])
    assert list(found.types.values()) == ["IQ2_XXS"] * 6 + ["Q4_K"] * 4


def test_a_budget_that_is_too_small_is_told_with_the_smallest_and_the_largest() -> None:
    made = [Unit(("a.weight",), "a", (Option("Q4_K", 320, 1.0), Option("Q6_K", 640, 0.1)))]
    with pytest.raises(
        InputError,
        match=re.escape(
            "size: expected at least 320 bytes of tensors (the most is 640), found 300"
        ),
    ):
        solve(made, [Budget("size", 300)])


# ---- units

SPECS = [
    TensorSpec(f"blk.{n}.ffn_{part}.weight", (256, 8), TYPES["BF16"])
    for n in range(2)
    for part in ("gate", "up", "down")
]
DAMAGE = {t.name: {k: 1 / TYPES[k].bits_per_weight for k in KINDS} for t in SPECS}
GROUPS = {t.name: t.name for t in SPECS}


def test_gate_and_up_of_a_layer_are_one_unit() -> None:
    found = build_units(SPECS, DAMAGE, Constraints(), GROUPS)
    assert [u.names for u in found[:2]] == [
        ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
        ("blk.0.ffn_down.weight",),
    ]
    assert found[0].options[0].bytes == 2 * pad(TYPES["IQ2_XXS"].bytes(2048))
    assert len(build_units(SPECS, DAMAGE, Constraints(gate_up_alike=False), GROUPS)) == 6


def test_what_is_pinned_excluded_or_above_the_ceiling_is_no_option() -> None:
    constraints = Constraints(
        pinned={r"blk\.0\.ffn_down\.weight": "Q6_K"},
        excluded=frozenset({"IQ2_XXS"}),
        ceiling={"blk.1.ffn_down.weight": "IQ3_S"},
    )
    found = {
        u.names[0]: [o.type for o in u.options]
        for u in build_units(SPECS, DAMAGE, constraints, GROUPS)
    }
    assert found["blk.0.ffn_down.weight"] == ["Q6_K"]
    assert found["blk.1.ffn_down.weight"] == ["IQ3_S"]
    assert found["blk.0.ffn_gate.weight"] == ["IQ3_S", "Q4_K", "Q6_K"]


def test_every_tensor_without_a_type_is_told() -> None:
    constraints = Constraints(
        pinned={r"blk\.0\.ffn_down\.weight": "Q8_0"}, excluded=frozenset(KINDS)
    )
    with pytest.raises(InputError) as refused:
        build_units(SPECS, DAMAGE, constraints, GROUPS)
    assert len(refused.value.problems) == 4
    assert "tensor blk.0.ffn_down.weight: pinned to Q8_0, which it cannot have" in str(
        refused.value
    )
    assert "tensor blk.1.ffn_down.weight: no type is left of IQ2_XXS" in str(refused.value)
