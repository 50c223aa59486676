"""Folding: few rules, from which the plan is the same, tensor by tensor."""

import re

from hypothesis import given
from hypothesis import strategies as st

from quant.llama.types import FILE_TYPES, TYPES
from quant.plan.fold import choose_file_type, fold_types, format_block_pattern
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model
from quant.plan.plan import is_quantizable, make_plan

TINY = list_tensors(load_model("tiny-glm")[0].architecture)
GLM = list_tensors(load_model("glm-4.6")[0].architecture)
KINDS = ("Q2_K", "Q4_K", "Q6_K")


@given(st.data())
def test_any_allocation_folds_into_rules_that_plan_it(data: st.DataObject) -> None:
    types = {t.name: data.draw(st.sampled_from(KINDS)) for t in TINY if is_quantizable(t)}
    plan = make_plan(fold_types("V", "For tests.", types, TINY), TINY)
    assert {t.tensor.name: t.type.name for t in plan.tensors if t.tensor.name in types} == types


@given(st.sets(st.integers(0, 120), min_size=1))
def test_a_block_pattern_matches_its_numbers_and_no_others(blocks: set[int]) -> None:
    pattern = format_block_pattern(sorted(blocks))
    assert {n for n in range(200) if re.fullmatch(pattern, str(n))} == blocks


def test_block_patterns_are_written_as_a_person_would() -> None:
    assert format_block_pattern([3]) == "3"
    assert format_block_pattern(range(42, 61)) == r"(4[2-9]|5\d|60)"
    assert format_block_pattern([1, 2, 4]) == "[124]"


def test_a_class_in_runs_of_layers_takes_few_rules() -> None:
    types = {t.name: "Q4_K" for t in GLM if is_quantizable(t)}
    finer = re.compile(r"blk\.(4[2-9]|5\d)\.ffn_down_exps\.weight")
    types |= {name: "Q6_K" for name in types if finer.fullmatch(name)}
    rules = fold_types("V", "For tests.", types, GLM).rules
    assert [(r.tensors, r.type) for r in rules if "ffn_down_exps" in r.tensors] == [
        (r"blk\.(4[2-9]|5\d)\.ffn_down_exps\.weight", "Q6_K"),
        (r"blk\.\d+\.ffn_down_exps\.weight", "Q4_K"),
    ]
    assert len(rules) < 12


def test_a_file_is_named_after_its_commonest_type() -> None:
    assert [choose_file_type(t) for t in ("Q3_K", "Q4_K", "Q5_K")] == ["Q3_K_M", "Q4_K_M", "Q5_K_M"]
    assert [choose_file_type(t) for t in ("Q2_K", "Q6_K", "IQ2_S")] == ["Q2_K", "Q6_K", "IQ2_S"]
    assert all(choose_file_type(t) in FILE_TYPES for t in TYPES)
