"""Written variants: whatever is in them, they are read as the same variant."""

import tempfile
import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quant.core.toml import parse_json_value
from quant.llama.types import FILE_TYPES, TYPES
from quant.plan.allocate import allocate_variant
from quant.plan.budgets import SizeTarget
from quant.plan.fold import fold_types
from quant.plan.format import format_allocation, format_variant
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model, load_variant
from quant.plan.plan import is_quantizable
from quant.plan.recipe import Rule, Variant
from quant.plan.units import Constraints
from tests.quant.plan.conftest import make_inputs

TINY = list_tensors(load_model("tiny-glm")[0].architecture)
KINDS = ("Q2_K", "Q4_K", "Q6_K")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
"""Any text that UTF-8 can encode: quotes, backslashes and newlines too."""
FRACTIONS = st.floats(0, 1)
RULES = st.builds(
    Rule,
    tensors=TEXTS,
    type=st.sampled_from(sorted(TYPES)),
    why=TEXTS,
    optional=st.booleans(),
    only=st.sampled_from([None, "moe", "dense"]),
    depth=st.none() | st.tuples(FRACTIONS, FRACTIONS),
    narrow=st.none() | st.sampled_from(sorted(TYPES)),
)
VARIANTS = st.builds(
    Variant,
    name=TEXTS,
    summary=TEXTS,
    file_type=st.sampled_from(sorted(FILE_TYPES)),
    rules=st.lists(RULES, max_size=3).map(tuple),
    split=st.booleans(),
    answers=FRACTIONS,
)


@given(VARIANTS, st.lists(TEXTS, max_size=2))
def test_every_variant_is_read_as_it_was_written(variant: Variant, comments: list[str]) -> None:
    text = format_variant(variant, comments)
    assert parse_json_value(tomllib.loads(text), Variant, "test") == variant


@given(st.sampled_from(['"', "\\", "\n", "'", '"""', "\\u0041"]))
def test_a_summary_with_special_characters_is_loaded_from_its_file(special: str) -> None:
    rules = (Rule(".*", "Q4_K", f"A {special} in it."),)
    variant = Variant("V", f"Some {special} text.", "Q4_K_M", rules)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "V.toml"
        path.write_text(format_variant(variant, ["Made for tests."]))
        assert load_variant(str(path)) == variant


def test_a_folded_variant_is_loaded_from_its_file(tmp_path: Path) -> None:
    types = {t.name: KINDS[n % 3] for n, t in enumerate(TINY) if is_quantizable(t)}
    variant = fold_types("V", "For tests.", types, TINY)
    (tmp_path / "V.toml").write_text(format_variant(variant, ["Made for tests."]))
    assert load_variant(str(tmp_path / "V.toml")) == variant


def test_a_variant_is_written_as_a_person_would() -> None:
    rules = (Rule(r"blk\.\d+\.attn_q\.weight", "Q4_K", "Allocated: attn_q.", narrow="Q4_0"),)
    variant = Variant("V", "For tests.", "Q4_K_M", rules, answers=0.9)
    assert format_variant(variant, ["Made for tests."]).splitlines() == [
        "# Made for tests.",
        'name = "V"',
        'summary = "For tests."',
        'file_type = "Q4_K_M"',
        "answers = 0.9",
        "",
        "[[rules]]",
        r"tensors = 'blk\.\d+\.attn_q\.weight'",
        'type = "Q4_K"',
        'why = "Allocated: attn_q."',
        'narrow = "Q4_0"',
    ]


def test_an_allocation_names_its_size_and_its_sources_on_top() -> None:
    inputs = make_inputs("tiny-glm")
    allocation = allocate_variant(inputs, SizeTarget(5_000_000), "V", Constraints())
    head = format_allocation(allocation, inputs.sensitivities).partition("name =")[0]
    assert "Made by `quant allocate` for 5,000,000 bytes" in head
    assert "Sensitivities: priors by class, not measured on this model." in head
    assert "Thireus" in head
