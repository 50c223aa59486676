"""The shipped recipes: each loads, and every variant of every model can be planned."""

import re
from pathlib import Path

import pytest

from quant.calibration import sets
from quant.llama.types import TYPES
from quant.plan.inventory import list_tensors
from quant.plan.load import RECIPES, list_recipes, load_model, load_template_patch, load_variant
from quant.plan.plan import make_plan

MODELS, VARIANTS, TEMPLATES = (
    list_recipes("models"),
    list_recipes("variants"),
    list_recipes("templates"),
)
KEPT_WHOLE = "UD-TQ1_0"
"""The one that Ollama pulls, which cannot pull shards."""


def test_there_is_something_to_ship() -> None:
    assert {"glm-4.6", "tiny-glm"} <= set(MODELS)
    assert {"BF16", KEPT_WHOLE, "UD-Q4_K_XL"} <= set(VARIANTS)
    assert "glm-4.6" in TEMPLATES


@pytest.mark.parametrize("name", MODELS)
def test_every_model_loads_and_names_only_what_exists(name: str) -> None:
    model, path = load_model(name)
    assert (model.name, path) == (name, RECIPES / "models" / f"{name}.toml")
    assert set(model.variants) <= set(VARIANTS)
    assert len(set(model.variants)) == len(model.variants)
    assert model.template in {*TEMPLATES, "none"}
    assert sets.find_set(model.imatrix.calibration)[0].name == (
        "embedded" if name == "tiny-glm" else "glm"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_loads_under_its_own_name(name: str) -> None:
    variant = load_variant(name)
    assert variant.name == name
    assert variant.summary.endswith(".")
    assert variant.split is (name != KEPT_WHOLE)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_rule_compiles_and_says_why(name: str) -> None:
    for rule in load_variant(name).rules:
        assert re.compile(rule.tensors)
        assert len(rule.why.split()) >= 3
        assert rule.why.endswith(".")


@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_holds_a_ternary_type(name: str) -> None:
    used = {t for rule in load_variant(name).rules for t in (rule.type, rule.narrow) if t}
    assert used <= set(TYPES)
    assert not {t for t in used if t.startswith("TQ")}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_patch_loads_under_its_own_name_and_says_why(name: str) -> None:
    by = load_template_patch(name)
    assert by.name == name
    assert by.replacements
    assert all(len(change.why.split()) > 5 for change in by.replacements)


PAIRS = [(m, v) for m in MODELS for v in load_model(m)[0].variants if load_model(m)[0].architecture]


@pytest.mark.parametrize(("model", "variant"), PAIRS, ids=[f"{m}-{v}" for m, v in PAIRS])
def test_every_variant_of_every_model_can_be_planned(model: str, variant: str) -> None:
    recipe, _ = load_model(model)
    tensors = list_tensors(recipe.architecture)
    planned = make_plan(load_variant(variant), tensors)
    assert len(planned.tensors) == len(tensors)
    assert planned.bytes > 0


@pytest.mark.parametrize("model", sorted({m for m, _ in PAIRS}))
def test_a_larger_name_is_no_smaller_file(model: str) -> None:
    recipe, _ = load_model(model)
    ladder = [v for v in recipe.variants if v.startswith("UD-")]
    sizes = [make_plan(load_variant(v), list_tensors(recipe.architecture)).bytes for v in ladder]
    assert sizes == sorted(sizes)


def test_recipes_lie_where_a_clone_has_them() -> None:
    assert Path(__file__).parents[2] / "recipes" == RECIPES
