"""What each field of a rule means, on models of every kind and on the shipped recipes."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES
from quant.plan.inventory import list_tensors
from quant.plan.load import list_recipes, load_model, load_variant
from quant.plan.plan import (
    compute_depths,
    find_coverable,
    find_plan_problems,
    is_moe,
    is_quantizable,
    make_plan,
    match_rules,
)
from quant.plan.recipe import Rule, Variant

MODELS = {name: list_tensors(load_model(name)[0].architecture) for name in list_recipes("models")}
VARIANTS = {name: load_variant(name) for name in list_recipes("variants") if name != "BF16"}
LOW = sorted(name for name, kind in TYPES.items() if kind.needs_imatrix)
GATHERED = ("token_embd.weight", "blk.92.nextn.embed_tokens.weight")
"""Tables that are looked up row by row, for which no imatrix can have data."""


def variant(*rules: Rule) -> Variant:
    return Variant("V", "For tests.", "Q4_K_M", rules)


def rule(tensors: str, wanted: str, **settings: object) -> Rule:
    return Rule(tensors, wanted, "For tests.", **settings)  # type: ignore[arg-type]


REST = rule(".*", "Q4_K", narrow="Q5_0")


def test_there_are_low_bit_types() -> None:
    assert LOW == ["IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_XXS"]


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("table", GATHERED)
def test_a_low_bit_type_is_refused_for_a_lookup_table(low: str, table: str) -> None:
    problems = list(
        find_plan_problems(
            variant(rule(table.replace(".", r"\."), low), REST), MODELS["glm-4.7"], None
        )
    )
    reason = f"{low} needs imatrix data, found none for this tensor; give it a type that needs none"
    assert problems == [f"variant V: rules[0]: tensor {table}: {reason}"]


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.7", "glm-4.7-flash", "glm-5"])
def test_a_low_bit_type_is_refused_for_every_matrix_of_an_mtp_block(model: str, low: str) -> None:
    tensors = MODELS[model]
    at = compute_depths(tensors)
    ahead = {t.name for t in tensors if is_quantizable(t) and at.get(t.name, 0) >= 1}
    assert ahead
    problems = list(
        find_plan_problems(
            variant(rule(".*", low, depth=(1.0, 2.0), narrow="IQ4_NL"), REST), tensors, None
        )
    )
    narrow = {t.name for t in tensors if t.shape[0] % 256}
    assert {line.split()[4].rstrip(":") for line in problems} == ahead - narrow


@pytest.mark.parametrize("model", MODELS)
def test_a_low_bit_type_is_accepted_for_every_block_of_the_trunk(model: str) -> None:
    rules = variant(rule(r"blk\..*", "IQ1_S", depth=(0.0, 1.0), narrow="IQ4_NL"), REST)
    assert list(find_plan_problems(rules, MODELS[model], None)) == []


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_shipped_variants_give_low_bit_types_only_where_there_can_be_data(
    model: str, name: str
) -> None:
    tensors = MODELS[model]
    low = {
        t.tensor.name for t in make_plan(VARIANTS[name], tensors).tensors if t.type.needs_imatrix
    }
    assert low <= find_coverable(tensors)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_shipped_rule_decides_something_in_some_model(name: str) -> None:
    used = {n for tensors in MODELS.values() for n in match_rules(VARIANTS[name], tensors).values()}
    assert used - {None} == set(range(len(VARIANTS[name].rules)))


@pytest.mark.parametrize("only", ["moe", "dense"])
@pytest.mark.parametrize("model", MODELS)
def test_only_limits_a_rule_to_one_kind_of_model(model: str, only: str) -> None:
    tensors = MODELS[model]
    of_kind = (only == "moe") == is_moe(tensors)
    decided = match_rules(variant(rule(".*", "Q6_K", only=only), REST), tensors)
    assert set(decided.values()) == {0 if of_kind else 1}


@settings(max_examples=30)
@given(st.sampled_from(sorted(MODELS)), st.floats(0, 1), st.floats(0.001, 1))
def test_depth_is_from_and_not_up_to(model: str, start: float, length: float) -> None:
    tensors = MODELS[model]
    at = compute_depths(tensors)
    decided = match_rules(
        variant(rule(r"blk\..*", "Q6_K", depth=(start, start + length)), REST), tensors
    )
    assert {n for n, by in decided.items() if by == 0} == {
        n for n in decided if n in at and start <= at[n] < start + length
    }


def test_the_halves_of_a_trunk_are_all_of_it() -> None:
    for model in MODELS:
        for cut in (0.1, 0.31, 0.5, 0.77):
            halves = [
                rule(r"blk\..*", "Q6_K", depth=d, narrow="Q8_0") for d in ((0.0, cut), (cut, 1.0))
            ]
            decided = match_rules(variant(*halves, REST), MODELS[model])
            trunk = find_coverable(MODELS[model])
            assert {n for n, by in decided.items() if by in (0, 1)} == trunk & decided.keys()


def test_the_fallback_type_is_for_rows_that_do_not_fill_blocks_alone() -> None:
    tensors = MODELS["glm-5"]
    planned = make_plan(variant(rule(".*", "Q6_K", narrow="Q8_0")), tensors)
    found = {t.tensor.name for t in planned.tensors if t.type.name == "Q8_0"}
    assert found == {t.name for t in tensors if t.name.endswith("attn_k_b.weight")}


def test_without_a_fallback_type_a_row_that_does_not_fill_blocks_is_a_problem() -> None:
    problems = list(find_plan_problems(variant(rule(".*", "Q6_K")), MODELS["glm-4.6v-flash"], None))
    assert len(problems) == 40
    assert problems[0] == (
        "variant V: rules[0]: tensor blk.0.ffn_down.weight: expected a row that is a multiple of 256"
        " for Q6_K, found 13696; give the rule a `narrow` type"
    )


def test_a_fallback_type_that_does_not_fit_either_is_a_problem() -> None:
    odd = (TensorSpec("blk.0.attn_q.weight", (40, 8), TYPES["BF16"]),)
    [problem] = find_plan_problems(variant(rule(".*", "Q6_K", narrow="Q8_0")), odd, None)
    assert "expected a row that is a multiple of 32 for Q8_0, found 40" in problem


def test_imatrix_data_is_needed_for_the_type_that_a_row_really_gets() -> None:
    rules = variant(rule(".*", "IQ1_S", narrow="IQ4_NL"))
    for row, refused in ((256, 1), (288, 0)):
        embedding = (TensorSpec("token_embd.weight", (row, 8), TYPES["BF16"]),)
        assert len([*find_plan_problems(rules, embedding, None)]) == refused


@pytest.mark.parametrize("model", MODELS)
def test_a_rule_that_matches_nothing_is_a_problem_unless_it_is_optional(model: str) -> None:
    useless = rule(r"blk\.\d+\.ffn_up_exp\.weight", "Q4_K")  # without its s
    [problem] = find_plan_problems(variant(useless, REST), MODELS[model], None)
    assert problem.startswith("variant V: rules[0] (")
    assert not [
        *find_plan_problems(variant(replace(useless, optional=True), REST), MODELS[model], None)
    ]


@pytest.mark.parametrize("model", MODELS)
def test_a_rule_that_only_matches_unquantized_tensors_is_a_problem(model: str) -> None:
    norms = rule(r".*_norm\.weight", "Q8_0")
    [problem] = find_plan_problems(variant(norms, REST), MODELS[model], None)
    assert "matches no tensor of this model" in problem


@pytest.mark.parametrize("model", MODELS)
def test_the_order_in_which_tensors_are_given_does_not_matter(model: str) -> None:
    shuffled = list(MODELS[model])
    random.Random(model).shuffle(shuffled)
    chosen = VARIANTS["UD-Q2_K_XL"]
    assert make_plan(chosen, shuffled).json() == make_plan(chosen, MODELS[model]).json()


@pytest.mark.parametrize("model", MODELS)
def test_every_weight_is_planned_once(model: str) -> None:
    for chosen in VARIANTS.values():
        planned = make_plan(chosen, MODELS[model])
        assert sorted(t.tensor.name for t in planned.tensors) == sorted(
            t.name for t in MODELS[model]
        )
        assert (
            planned.bytes
            >= sum(t.bytes for t in planned.tensors)
            == sum(planned.type_bytes().values())
        )


def test_all_problems_of_a_variant_are_reported_at_once() -> None:
    def problems(*rules: Rule) -> Iterator[str]:
        return find_plan_problems(variant(*rules), MODELS["glm-4.6"], None)

    found = list(
        problems(
            rule("nothing", "Q4_K"), rule(r"token_embd\.weight", "IQ1_S"), rule(r"blk\..*", "Q4_K")
        )
    )
    assert len(found) == 3
    assert "matches no tensor" in found[0]
    assert "needs imatrix data" in found[1]
    assert "tensor output.weight: expected a rule that matches it, found none" in found[2]
