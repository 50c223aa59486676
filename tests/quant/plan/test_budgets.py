"""Variants for sizes: GLM-4.6 from its numbers alone, what a size may be, and what contradicts itself."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from quant.errors import InputError
from quant.llama.tensors import tensor_class
from quant.llama.types import TYPES
from quant.plan import priors
from quant.plan.budgets import (
    AllocationInputs,
    SizeTarget,
    allocate_ladder,
    allocate_variant,
    make_bpw_target,
    parse_file_size,
    parse_memory_budget,
)
from quant.plan.inventory import read_architecture
from quant.plan.load import load_model, load_variant
from quant.plan.plan import CoveragePolicy, find_coverable, make_plan
from quant.plan.solver import SLOW, Constraints

PUBLISHED = {
    "UD-TQ1_0": 83.8,
    "UD-IQ1_S": 96.1,
    "UD-IQ1_M": 107.1,
    "UD-IQ2_XXS": 114.8,
    "UD-Q2_K_XL": 135.0,
    "UD-IQ3_XXS": 145.0,
    "UD-Q3_K_XL": 158.3,
    "UD-Q4_K_XL": 204.4,
    "UD-Q5_K_XL": 251.9,
}
"""Sizes of GLM-4.6's variants in GB."""


def material(model: str) -> AllocationInputs:
    recipe, _ = load_model(model)
    told = read_architecture(recipe.architecture)
    tensors = told.tensors()
    return AllocationInputs(
        tensors,
        frozenset(find_coverable(tensors)),
        priors.make_typical_errors(tensors),
        priors.make_prior_sensitivities(tensors),
        recipe.header_bytes,
        kv_bytes=told.kv_bytes_per_token(),
    )


GLM = material("glm-4.6")
TINY = material("tiny-glm")


def test_glm_is_allocated_to_its_published_sizes_within_a_fifth_of_a_percent_below() -> None:
    assert len(GLM.tensors) == 1759
    for name, gigabytes in PUBLISHED.items():
        made = allocate_variant(
            GLM, SizeTarget(int(gigabytes * 1e9)), name, "For tests.", Constraints()
        )
        assert 0.998 * gigabytes * 1e9 <= made.bytes <= gigabytes * 1e9
        assert made.solution.gap <= 1e-3, name
        planned = make_plan(made.variant, GLM.tensors)
        assert GLM.file_bytes(planned) == made.bytes
        assert len(made.variant.rules) < 50


def test_allocated_variants_are_predicted_better_than_those_made_by_hand() -> None:
    for name in ("UD-IQ1_S", "UD-Q2_K_XL", "UD-Q4_K_XL"):
        by_hand = make_plan(load_variant(name), GLM.tensors)
        made = allocate_variant(
            GLM,
            SizeTarget(GLM.file_bytes(by_hand)),
            name,
            "For tests.",
            Constraints(mtp_pinned=False),
        )
        types = {t.tensor.name: t.type.name for t in by_hand.tensors}
        assert made.solution.damage < 0.95 * GLM.sensitivities.predicted(types, GLM.errors)


def test_on_a_ladder_no_tensor_of_a_smaller_file_is_finer() -> None:
    sizes = [*range(4_000_000, 4_100_000, 10_000), 6_000_000]  # near sizes alone would swap tensors
    made = allocate_ladder(TINY, {str(b): SizeTarget(b) for b in sizes}, Constraints())
    assert [a.target.bytes for a in made] == sizes[::-1]
    for larger, smaller in itertools.pairwise(made):
        for name, kind in smaller.solution.types.items():
            assert TYPES[kind].bits_per_weight <= TYPES[larger.solution.types[name]].bits_per_weight


def test_a_ladder_that_need_not_be_monotone_is_made_of_single_solutions() -> None:
    targets = {str(b): SizeTarget(b) for b in (4_000_000, 4_050_000, 6_000_000)}
    alone = {
        name: allocate_variant(TINY, target, name, "x", Constraints()).solution
        for name, target in targets.items()
    }
    made = allocate_ladder(TINY, targets, Constraints(), monotone=False)
    assert {a.variant.name: a.solution for a in made} == alone


def test_what_a_machine_computes_slowly_can_be_left_out() -> None:
    for machine, slow in SLOW.items():
        made = allocate_variant(
            TINY, SizeTarget(5_000_000), machine, "For tests.", Constraints(excluded=slow)
        )
        assert not slow & set(made.solution.types.values())


def test_priors_say_whom_they_come_from() -> None:
    assert "Thireus" in GLM.sensitivities.credit
    assert "GGUF Tool Suite" in GLM.sensitivities.credit
    assert "priors" in GLM.sensitivities.source


def test_the_block_that_only_guesses_ahead_has_types_of_its_own() -> None:
    made = allocate_variant(GLM, SizeTarget(100 * 10**9), "V", "For tests.", Constraints())
    behind = {tensor_class(n): k for n, k in made.solution.types.items() if n.startswith("blk.92.")}
    assert behind.pop("nextn.eh_proj") == "Q5_K"
    assert set(behind.values()) == {"Q2_K"}


def test_tensors_in_doubt_get_no_type_below_the_floor() -> None:
    name = "blk.2.ffn_down_exps.weight"
    doubting = replace(TINY, doubt=CoveragePolicy({name: "3 tokens"}, "raise", "Q4_K"))
    made = allocate_variant(doubting, SizeTarget(3_000_000), "V", "For tests.", Constraints())
    assert TYPES[made.solution.types[name]].bits_per_weight >= 4.5


# ---- sizes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("84GB", 84 * 10**9),
        ("80.5 GiB", int(80.5 * 2**30)),
        ("4843584B", 4843584),
        ("900MB", 9 * 10**8),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, found: int) -> None:
    assert parse_file_size(text) == found


@pytest.mark.parametrize("text", ["84", "GB", "-3GB", "3 gb", ""])
def test_another_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a number with one of B, kB, MB"):
        parse_file_size(text)


def test_what_fits_leaves_room_for_the_cache() -> None:
    assert parse_memory_budget("24GB gpu + 128GB ram, ctx 1000", 10**6) == SizeTarget(
        151 * 10**9, 23 * 10**9
    )
    assert parse_memory_budget("24GB gpu", 10**6) == SizeTarget(24 * 10**9)
    assert parse_memory_budget("64GB ram, ctx 1000", 10**6) == SizeTarget(63 * 10**9)
    with pytest.raises(InputError, match="expected a text like '24GB gpu"):
        parse_memory_budget("a large machine", 1)


def test_what_is_no_expert_keeps_to_the_accelerator() -> None:
    made = allocate_variant(
        GLM, SizeTarget(150 * 10**9, 9 * 10**9), "V", "For tests.", Constraints()
    )
    planned = make_plan(made.variant, GLM.tensors)
    assert (
        sum(t.bytes for t in planned.tensors if "_exps." not in t.tensor.name) + GLM.head_bytes
        <= 9 * 10**9
    )
    assert 0.998 * 150e9 <= made.bytes <= 150e9


def test_bits_per_weight_are_those_of_the_plan() -> None:
    made = allocate_variant(TINY, make_bpw_target(TINY, 4.0), "V", "For tests.", Constraints())
    assert 3.98 <= make_plan(made.variant, TINY.tensors).bits_per_weight <= 4.0


def test_a_size_out_of_reach_is_told_with_the_smallest_and_the_largest() -> None:
    for bytes_ in (1_000_000, 100_000_000):
        with pytest.raises(InputError) as refused:
            allocate_variant(TINY, SizeTarget(bytes_), "V", "For tests.", Constraints())
        assert re.match(
            rf"size: expected [\d,]+ to [\d,]+ bytes for these types, found {bytes_:,}",
            str(refused.value),
        )


def test_contradictions_are_told_all_at_once() -> None:
    pinned = {"nothing": "Q4_K", r"output\.weight": "Q6_K", r"token_embd\.weight": "Q9_K"}
    with pytest.raises(InputError) as refused:
        allocate_variant(
            TINY,
            SizeTarget(5_000_000),
            "V",
            "For tests.",
            Constraints(pinned=pinned, excluded=frozenset({"Q6_K"})),
        )
    assert set(refused.value.problems) == {
        "pin nothing=Q4_K: no tensor of this model has such a name",
        r"pin output\.weight=Q6_K: Q6_K is excluded; leave out one of the two",
        r"pin token_embd\.weight=Q9_K: Q9_K is not one of ggml's types",
    }


def test_sensitivities_of_another_model_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"sensitivities: of another model: .* tensors are not in them, first"
    ):
        allocate_variant(
            replace(GLM, sensitivities=TINY.sensitivities),
            SizeTarget(10**11),
            "V",
            "For tests.",
            Constraints(),
        )


def test_the_material_needs_no_weights(tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    assert GLM.base is None
