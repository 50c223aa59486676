"""Allocation to sizes: published sizes, monotone ladders, and contradictions."""

import itertools
import re
from dataclasses import replace

import pytest

from quant.core.errors import InputError
from quant.llama.tensors import tensor_class
from quant.llama.types import TYPES
from quant.plan.allocate import allocate_ladder, allocate_variant
from quant.plan.budgets import SizeTarget, make_bpw_target
from quant.plan.load import load_variant
from quant.plan.plan import CoveragePolicy, make_plan
from quant.plan.units import SLOW_TYPES, Constraints
from tests.quant.plan.conftest import make_inputs

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
GLM = make_inputs("glm-4.6")
TINY = make_inputs("tiny-glm")


def test_glm_is_allocated_to_its_published_sizes_within_a_fifth_of_a_percent_below() -> None:
    assert len(GLM.tensors) == 1759
    for name, gigabytes in PUBLISHED.items():
        allocation = allocate_variant(GLM, SizeTarget(int(gigabytes * 1e9)), name, Constraints())
        assert 0.998 * gigabytes * 1e9 <= allocation.bytes <= gigabytes * 1e9
        assert allocation.solution.gap <= 1e-3, name
        plan = make_plan(allocation.variant, GLM.tensors)
        assert GLM.forecast_bytes(plan) == allocation.bytes
        assert len(allocation.variant.rules) < 50


def test_an_allocated_variant_has_less_predicted_kld_than_the_one_written_by_hand() -> None:
    for name in ("UD-IQ1_S", "UD-Q2_K_XL", "UD-Q4_K_XL"):
        by_hand = make_plan(load_variant(name), GLM.tensors)
        target = SizeTarget(GLM.forecast_bytes(by_hand))
        allocation = allocate_variant(GLM, target, name, Constraints(mtp_pinned=False))
        types = {t.tensor.name: t.type.name for t in by_hand.tensors}
        assert allocation.solution.kld < 0.95 * GLM.sensitivities.predict_kld(types, GLM.errors)


def test_on_a_ladder_no_tensor_of_a_smaller_file_has_a_larger_type() -> None:
    # Sizes that are near each other would swap tensors if nothing kept them.
    sizes = [*range(4_000_000, 4_100_000, 10_000), 6_000_000]
    ladder = allocate_ladder(TINY, {str(b): SizeTarget(b) for b in sizes}, Constraints())
    assert [a.target.bytes for a in ladder] == sizes[::-1]
    for larger, smaller in itertools.pairwise(ladder):
        for name, kind in smaller.solution.types.items():
            assert TYPES[kind].bits_per_weight <= TYPES[larger.solution.types[name]].bits_per_weight


def test_a_ladder_that_need_not_be_monotone_has_the_solution_of_each_size() -> None:
    targets = {str(b): SizeTarget(b) for b in (4_000_000, 4_050_000, 6_000_000)}
    single = {
        name: allocate_variant(TINY, target, name, Constraints()).solution
        for name, target in targets.items()
    }
    ladder = allocate_ladder(TINY, targets, Constraints(), monotone=False)
    assert {a.variant.name: a.solution for a in ladder} == single


def test_types_that_a_machine_computes_slowly_can_be_left_out() -> None:
    for machine, slow in SLOW_TYPES.items():
        limits = Constraints(excluded=slow)
        allocation = allocate_variant(TINY, SizeTarget(5_000_000), machine, limits)
        assert not slow & set(allocation.solution.types.values())


def test_priors_name_their_source() -> None:
    assert "Thireus" in GLM.sensitivities.credit
    assert "GGUF Tool Suite" in GLM.sensitivities.credit
    assert "priors" in GLM.sensitivities.source


def test_an_mtp_block_has_fixed_types() -> None:
    allocation = allocate_variant(GLM, SizeTarget(100 * 10**9), "V", Constraints())
    types = allocation.solution.types
    mtp = {tensor_class(n): k for n, k in types.items() if n.startswith("blk.92.")}
    assert mtp.pop("nextn.eh_proj") == "Q5_K"
    assert set(mtp.values()) == {"Q2_K"}


def test_tensors_with_insufficient_coverage_get_no_type_below_the_floor() -> None:
    name = "blk.2.ffn_down_exps.weight"
    inputs = replace(TINY, policy=CoveragePolicy({name: "3 tokens"}, "raise", "Q4_K"))
    allocation = allocate_variant(inputs, SizeTarget(3_000_000), "V", Constraints())
    assert TYPES[allocation.solution.types[name]].bits_per_weight >= 4.5


def test_everything_but_experts_fits_the_accelerator() -> None:
    target = SizeTarget(150 * 10**9, 9 * 10**9)
    allocation = allocate_variant(GLM, target, "V", Constraints())
    plan = make_plan(allocation.variant, GLM.tensors)
    rest = sum(t.bytes for t in plan.tensors if "_exps." not in t.tensor.name)
    assert rest + GLM.head_bytes <= 9 * 10**9
    assert 0.998 * 150e9 <= allocation.bytes <= 150e9


def test_bits_per_weight_are_those_of_the_plan() -> None:
    target = make_bpw_target(TINY.tensors, TINY.head_bytes, 4.0)
    allocation = allocate_variant(TINY, target, "V", Constraints())
    assert 3.98 <= make_plan(allocation.variant, TINY.tensors).bits_per_weight <= 4.0


def test_a_size_out_of_reach_is_refused_with_the_smallest_and_the_largest() -> None:
    for size in (1_000_000, 100_000_000):
        with pytest.raises(InputError) as refused:
            allocate_variant(TINY, SizeTarget(size), "V", Constraints())
        assert re.match(
            rf"size: expected [\d,]+ to [\d,]+ bytes for these types, found {size:,}",
            str(refused.value),
        )


def test_all_contradictions_are_reported_at_once() -> None:
    pinned = {"nothing": "Q4_K", r"output\.weight": "Q6_K", r"token_embd\.weight": "Q9_K"}
    limits = Constraints(pinned=pinned, excluded=frozenset({"Q6_K"}))
    with pytest.raises(InputError) as refused:
        allocate_variant(TINY, SizeTarget(5_000_000), "V", limits)
    assert set(refused.value.problems) == {
        "pin nothing=Q4_K: no tensor of this model has such a name",
        r"pin output\.weight=Q6_K: Q6_K is excluded; leave out one of the two",
        r"pin token_embd\.weight=Q9_K: Q9_K is not one of ggml's types",
    }


def test_sensitivities_of_another_model_are_refused() -> None:
    inputs = replace(GLM, sensitivities=TINY.sensitivities)
    message = r"sensitivities: of another model: .* tensors are not in them, first"
    with pytest.raises(InputError, match=message):
        allocate_variant(inputs, SizeTarget(10**11), "V", Constraints())


def test_priors_need_no_weights() -> None:
    assert GLM.base is None
