"""Every variant of every model as a table: the diff of a changed rule shows all its effects.

``pytest --update-golden`` writes the tables anew.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from quant.llama.tensors import split_block, tensor_class
from quant.plan.inventory import list_tensors
from quant.plan.load import list_recipes, load_model, load_variant
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import parse_size
from quant.plan.sizes import forecast_shard_bytes

FOLDER = Path(__file__).parent / "plans"
PAIRS = [
    (model, variant) for model in list_recipes("models") for variant in list_recipes("variants")
]


@pytest.mark.parametrize(("model", "variant"), PAIRS)
def test_a_variant_of_a_model_is_planned_as_in_its_table(
    model: str, variant: str, pytestconfig: pytest.Config
) -> None:
    recipe, _ = load_model(model)
    plan = make_plan(load_variant(variant), list_tensors(recipe.architecture))
    actual = table(plan, recipe.title, parse_size(recipe.max_shard_size))
    path = FOLDER / model / f"{variant}.txt"
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(actual)
    assert path.exists(), f"{path}: missing; pytest --update-golden writes it"
    assert actual.splitlines() == path.read_text().splitlines()


def test_every_table_has_its_plan() -> None:
    tables = {(path.parent.name, path.stem) for path in FOLDER.glob("*/*")}
    assert tables == set(PAIRS)


def table(plan: Plan, title: str, max_bytes: int) -> str:
    """Return totals, then the blocks of each class of tensors by type."""
    shards = forecast_shard_bytes(plan, max_bytes) if plan.variant.split else (plan.bytes,)
    bpw = f"{plan.bits_per_weight:.4f} bits per weight"
    lines = [
        f"{title} {plan.variant.name}",
        f"{len(plan.tensors)} tensors, {plan.bytes:,} bytes, {bpw}",
        *(f"shard {number}: {size:,} bytes" for number, size in enumerate(shards, 1)),
        *sorted(list_classes(plan), key=lambda line: line.split()[1]),
    ]
    return "\n".join(lines) + "\n"


def list_classes(plan: Plan) -> Iterator[str]:
    blocks: dict[tuple[str, str], list[int]] = {}
    for t in plan.tensors:
        of_type = blocks.setdefault((tensor_class(t.tensor.name), t.type.name), [])
        block, _ = split_block(t.tensor.name)
        if block is not None:
            of_type.append(block)
    for (name, ggml_type), where in blocks.items():
        yield f"{'blk.' + ranges(where) if where else '-':<14} {name:<24} {ggml_type}"


def ranges(numbers: list[int]) -> str:
    """``0-2,5`` for 0, 1, 2 and 5."""
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def test_ranges_are_runs_of_numbers() -> None:
    assert ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
