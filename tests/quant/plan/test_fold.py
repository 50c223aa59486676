"""Folding: rules that a person can read, and from which the plan is the same, tensor by tensor."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quant.plan.fold import fold_types, format_block_pattern, format_variant
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model, load_variant
from quant.plan.plan import is_quantizable, make_plan

TINY = list_tensors(load_model("tiny-glm")[0].architecture)
GLM = list_tensors(load_model("glm-4.6")[0].architecture)
KINDS = ("Q2_K", "Q4_K", "Q6_K")


@given(st.data())
def test_any_allocation_folds_into_rules_that_plan_it(data: st.DataObject) -> None:
    types = {t.name: data.draw(st.sampled_from(KINDS)) for t in TINY if is_quantizable(t)}
    planned = make_plan(fold_types("V", "For tests.", types, TINY), TINY)
    assert {t.tensor.name: t.type.name for t in planned.tensors if t.tensor.name in types} == types


@given(st.sets(st.integers(0, 120), min_size=1))
def test_a_pattern_of_numbers_matches_these_and_no_others(wanted: set[int]) -> None:
    pattern = format_block_pattern(sorted(wanted))
    assert {n for n in range(200) if re.fullmatch(pattern, str(n))} == wanted


def test_numbers_are_written_as_a_person_would() -> None:
    assert format_block_pattern([3]) == "3"
    assert format_block_pattern(range(42, 61)) == r"(4[2-9]|5\d|60)"
    assert format_block_pattern([1, 2, 4]) == "[124]"


def test_the_text_reads_as_the_same_variant(tmp_path: Path) -> None:
    types = {t.name: KINDS[n % 3] for n, t in enumerate(TINY) if is_quantizable(t)}
    variant = fold_types("V", "For tests.", types, TINY)
    (tmp_path / "V.toml").write_text(format_variant(variant, ["Made for tests."]))
    assert load_variant(str(tmp_path / "V.toml")) == variant


def test_a_class_in_runs_of_layers_takes_few_rules() -> None:
    types = {t.name: "Q4_K" for t in GLM if is_quantizable(t)}
    types |= {
        name: "Q6_K"
        for name in types
        if re.fullmatch(r"blk\.(4[2-9]|5\d)\.ffn_down_exps\.weight", name)
    }
    rules = fold_types("V", "For tests.", types, GLM).rules
    assert [(r.tensors, r.type) for r in rules if "ffn_down_exps" in r.tensors] == [
        (r"blk\.(4[2-9]|5\d)\.ffn_down_exps\.weight", "Q6_K"),
        (r"blk\.\d+\.ffn_down_exps\.weight", "Q4_K"),
    ]
    assert len(rules) < 12
