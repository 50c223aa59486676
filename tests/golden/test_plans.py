"""Every variant of every model as a table: whoever changes a rule sees in the diff what it does to all of them.

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
def test_a_variant_of_a_model_is_planned_as_it_was(
    model: str, variant: str, pytestconfig: pytest.Config
) -> None:
    recipe, _ = load_model(model)
    planned = make_plan(load_variant(variant), list_tensors(recipe.architecture))
    found = table(planned, recipe.title, parse_size(recipe.max_shard_size))
    path = FOLDER / model / f"{variant}.txt"
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"{path}: missing; pytest --update-golden writes it"
    assert found.splitlines() == path.read_text().splitlines()


def test_there_is_no_table_of_a_plan_that_is_none() -> None:
    tables = {(path.parent.name, path.stem) for path in FOLDER.glob("*/*")}
    assert tables == set(PAIRS)


def table(planned: Plan, title: str, max_bytes: int) -> str:
    """Totals, then the type of each class of tensors and the blocks where it is so."""
    shards = forecast_shard_bytes(planned, max_bytes) if planned.variant.split else (planned.bytes,)
    lines = [
        f"{title} {planned.variant.name}",
        f"{len(planned.tensors)} tensors, {planned.bytes:,} bytes, {planned.bits_per_weight:.4f} bits per weight",
        *(f"shard {number}: {size:,} bytes" for number, size in enumerate(shards, 1)),
        *sorted(lines_of(planned), key=lambda line: line.split()[1]),
    ]
    return "\n".join(lines) + "\n"


def lines_of(planned: Plan) -> Iterator[str]:
    blocks: dict[tuple[str, str], list[int]] = {}
    for t in planned.tensors:
        of_kind = blocks.setdefault((tensor_class(t.tensor.name), t.type.name), [])
        block, _ = split_block(t.tensor.name)
        if block is not None:
            of_kind.append(block)
    for (name, kind), where in blocks.items():
        yield f"{'blk.' + ranges(where) if where else '-':<14} {name:<24} {kind}"


def ranges(numbers: list[int]) -> str:
    """``0-2,5`` for 0, 1, 2 and 5."""
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def test_ranges_are_runs_of_numbers() -> None:
    assert ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
