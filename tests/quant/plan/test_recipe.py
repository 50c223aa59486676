"""Recipes: what a person may write; every mistake is reported with its place."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.core import toml
from quant.core.errors import InputError
from quant.plan import recipe
from quant.plan.load import (
    find_model_of_file,
    find_variant_of_file,
    list_recipes,
    load_model,
    load_template_patch,
    load_variant,
    read_type_file,
)
from quant.plan.recipe import Rule, parse_size

BROKEN = sorted((Path(__file__).parents[2] / "recipes" / "broken").glob("*.toml"))
LOADERS: dict[str, Callable[[str], Any]] = {
    "model": load_model,
    "variant": load_variant,
    "template": load_template_patch,
}
EXPECT = "# expect: "
VARIANT = """
name = "V"
summary = "For tests."
file_type = "Q4_K_M"
[[rules]]
tensors = '.*'
type = "Q4_K"
why = "All of it."
"""


@pytest.mark.parametrize("path", BROKEN, ids=[p.stem for p in BROKEN])
def test_a_broken_recipe_is_refused_with_all_its_problems(path: Path) -> None:
    lines = path.read_text(errors="replace").splitlines()
    expected = [f"{path}: {line.removeprefix(EXPECT)}" for line in lines if line.startswith(EXPECT)]
    with pytest.raises(InputError) as caught:
        LOADERS[path.stem.partition("-")[0]](str(path))
    assert sorted(caught.value.problems) == sorted(expected)


def test_there_are_enough_broken_recipes_and_each_says_what_is_wrong() -> None:
    assert len(BROKEN) >= 40
    assert all(p.read_bytes().startswith(EXPECT.encode()) for p in BROKEN)


def test_the_recipe_that_the_broken_ones_are_made_from_is_read(tmp_path: Path) -> None:
    path = tmp_path / "v.toml"
    path.write_text(VARIANT)
    variant = load_variant(str(path))
    assert (variant.name, variant.split, variant.answers) == ("V", True, 1.0)
    assert variant.rules == (Rule(".*", "Q4_K", "All of it."),)


def test_a_date_in_an_error_is_shown_as_text(tmp_path: Path) -> None:
    path = tmp_path / "v.toml"
    path.write_text(
        VARIANT.replace('"For tests."', '"x"').replace("[[rules]]", "split = 2026-01-01\n[[rules]]")
    )
    with pytest.raises(InputError, match=r"split: should be a valid boolean, found '2026-01-01'"):
        load_variant(str(path))


@pytest.mark.parametrize(
    ("load", "kind"),
    [(load_model, "model"), (load_variant, "variant"), (load_template_patch, "template")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    load: Callable[[str], Any], kind: str
) -> None:
    name = list_recipes(f"{kind}s")[-1]
    with pytest.raises(InputError) as caught:
        load(f"{name}x")
    assert str(caught.value) == f"{kind} '{name}x' is not known: did you mean '{name}'?"


def test_a_name_that_resembles_nothing_is_refused_with_all_names() -> None:
    with pytest.raises(
        InputError,
        match=rf"variant '' is not known: known are {', '.join(list_recipes('variants'))}",
    ):
        load_variant("")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"none.toml: cannot be read \(No such file or directory\)"
    ):
        load_variant(str(tmp_path / "none.toml"))


def test_a_name_never_leaves_the_folder_of_recipes() -> None:
    with pytest.raises(InputError, match="is not known"):
        load_variant("../models/tiny-glm")


@pytest.mark.parametrize(
    ("size", "expected"), [("50G", 50 * 10**9), ("2M", 2 * 10**6), ("1G", 10**9)]
)
def test_sizes_are_counted_as_llama_gguf_split_does(size: str, expected: int) -> None:
    assert parse_size(size) == expected


def test_a_rule_matches_whole_names() -> None:
    rule = Rule(r"blk\.1\.ffn_down\.weight", "Q4_K", "x")
    matching = [
        n
        for n in ("blk.1.ffn_down.weight", "blk.11.ffn_down.weight", "blk.1.ffn_down.weight_scale")
        if rule.matches(n, None, False)
    ]
    assert matching == ["blk.1.ffn_down.weight"]


@pytest.mark.parametrize(
    ("at", "expected"), [(None, False), (0.0, True), (0.49, True), (0.5, False), (1.0, False)]
)
def test_a_rule_for_a_range_of_depth_matches_only_there(at: float | None, expected: bool) -> None:
    assert (
        Rule(".*", "Q4_K", "x", depth=(0.0, 0.5)).matches("blk.0.a.weight", at, False) is expected
    )


@pytest.mark.parametrize(
    ("only", "moe", "expected"),
    [("moe", True, True), ("moe", False, False), ("dense", True, False), ("dense", False, True)],
)
def test_a_rule_for_a_kind_of_model_matches_only_there(
    only: Any, moe: bool, expected: bool
) -> None:
    assert Rule(".*", "Q4_K", "x", only=only).matches("a.weight", None, moe) is expected


def test_a_type_file_is_read_as_rules(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text(
        "# comment\n^output\\.weight$=q6_K\n\nblk\\..*=iq2_xxs # the rest\ntoken=BF16\n"
    )
    variant = read_type_file(path)
    assert [(r.tensors, r.type) for r in variant.rules] == [
        (r"output\.weight", "Q6_K"),
        (r"blk\..*", "IQ2_XXS"),
        ("token", "BF16"),
    ]
    assert all(r.optional for r in variant.rules)


def test_all_mistakes_of_a_type_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("a=q4_k\nb=q4_x\n(=q6_k\n")
    with pytest.raises(InputError) as caught:
        read_type_file(path)
    assert [p.split(": ")[1] for p in caught.value.problems] == [
        "rules[1].type",
        "rules[2].tensors",
    ]


@pytest.mark.parametrize("content", [None, b"\xff\xfe=q4_k"])
def test_a_type_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "types.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_type_file(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_keys_of_a_recipe_are_the_fields_of_its_nouns() -> None:
    """Unknown keys are compared with these, at every depth."""
    keys = toml._list_keys
    assert keys(recipe.ModelRecipe, ()) == [f.name for f in dataclasses.fields(recipe.ModelRecipe)]
    assert keys(recipe.ModelRecipe, ("smoke", 3)) == ["say", "expect"]
    assert keys(recipe.Variant, ("rules", 0)) == [f.name for f in dataclasses.fields(Rule)]
    assert keys(recipe.ModelRecipe, ("imatrix",)) == [
        f.name for f in dataclasses.fields(recipe.ImatrixRecipe)
    ]
    assert keys(recipe.ModelRecipe, ("imatrix", "coverage")) == [
        "expert_tokens",
        "budget",
        "otherwise",
        "floor",
    ]


def test_a_recipe_can_be_published_as_json() -> None:
    model, _ = load_model("tiny-glm")
    assert json.loads(json.dumps(dataclasses.asdict(model)))["name"] == "tiny-glm"


@pytest.mark.parametrize(
    ("file", "model", "variant"),
    [
        ("GLM-4.6-UD-Q2_K_XL-00001-of-00003.gguf", "glm-4.6", "UD-Q2_K_XL"),
        ("GLM-4.6V-Flash-Q4_1.gguf", "glm-4.6v-flash", "Q4_1"),
        ("glm-4.7-flash-BF16.gguf", "glm-4.7-flash", "BF16"),
        ("tiny-glm-Q8_0.gguf", "tiny-glm", "Q8_0"),
        ("tiny-glm-UD-Q8_K_XL.gguf", "tiny-glm", "UD-Q8_K_XL"),
        ("GLM-4.60-Q4_1.gguf", None, "Q4_1"),
        ("Qwen-Q9.gguf", None, None),
    ],
)
def test_model_and_variant_are_found_by_a_file_name(
    file: str, model: str | None, variant: str | None
) -> None:
    assert (find_model_of_file(file), find_variant_of_file(file)) == (model, variant)


TOKEN = "hf_PlantedTokenOfTheRecipe"


@pytest.mark.parametrize(
    "line", [f'summary = "{TOKEN}"', f"# {TOKEN}", f'token = "{TOKEN}"', f"= {TOKEN}"]
)
@pytest.mark.parametrize("load", [load_model, load_variant, load_template_patch])
def test_a_token_in_a_recipe_is_refused_and_not_repeated(
    load: Callable[[str], Any], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "v.toml"
    path.write_text(f'name = "V"\n{line}\n')
    with pytest.raises(InputError) as caught:
        load(str(path))
    [problem] = caught.value.problems
    assert problem.startswith(f"{path}: line 2: expected no token of the hub, found one; ")
    assert TOKEN not in problem


def test_a_token_in_a_list_of_types_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text(f"{TOKEN}=Q4_K\n")
    with pytest.raises(InputError, match="line 1: expected no token of the hub") as caught:
        read_type_file(path)
    assert TOKEN not in str(caught.value)
