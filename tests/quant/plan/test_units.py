"""Units and their options: what is chosen together, and what the constraints leave."""

import pytest

from quant.core.errors import InputError
from quant.llama.gguf import TensorSpec, pad
from quant.llama.types import TYPES
from quant.plan.units import Constraints, build_units

KINDS = ("IQ2_XXS", "IQ3_S", "Q4_K", "Q6_K")
SPECS = [
    TensorSpec(f"blk.{n}.ffn_{part}.weight", (256, 8), TYPES["BF16"])
    for n in range(2)
    for part in ("gate", "up", "down")
]
KLDS = {t.name: {k: 1 / TYPES[k].bits_per_weight for k in KINDS} for t in SPECS}


def test_gate_and_up_projection_of_a_layer_are_one_unit() -> None:
    units = build_units(SPECS, KLDS, Constraints())
    assert [u.names for u in units[:2]] == [
        ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
        ("blk.0.ffn_down.weight",),
    ]
    assert units[0].options[0].bytes == 2 * pad(TYPES["IQ2_XXS"].bytes(2048))
    assert len(build_units(SPECS, KLDS, Constraints(gate_up_alike=False))) == 6


@pytest.mark.parametrize("missing", ["gate", "up"])
def test_half_of_a_pair_is_a_unit_of_its_own(missing: str) -> None:
    klds = {n: k for n, k in KLDS.items() if n != f"blk.0.ffn_{missing}.weight"}
    units = build_units(SPECS, klds, Constraints())
    assert sorted(n for u in units for n in u.names) == sorted(klds)
    assert len(units) == 4


def test_pinned_excluded_and_too_large_types_are_no_options() -> None:
    constraints = Constraints(
        pinned={r"blk\.0\.ffn_down\.weight": "Q6_K"},
        excluded=frozenset({"IQ2_XXS"}),
        ceiling={"blk.1.ffn_down.weight": "IQ3_S"},
    )
    units = build_units(SPECS, KLDS, constraints)
    options = {u.names[0]: [o.type for o in u.options] for u in units}
    assert options["blk.0.ffn_down.weight"] == ["Q6_K"]
    assert options["blk.1.ffn_down.weight"] == ["IQ3_S"]
    assert options["blk.0.ffn_gate.weight"] == ["IQ3_S", "Q4_K", "Q6_K"]


def test_every_tensor_without_a_type_is_reported() -> None:
    pinned = {r"blk\.0\.ffn_down\.weight": "Q8_0"}
    with pytest.raises(InputError) as refused:
        build_units(SPECS, KLDS, Constraints(pinned=pinned, excluded=frozenset(KINDS)))
    text = str(refused.value)
    assert len(refused.value.problems) == 4
    assert "tensor blk.0.ffn_down.weight: pinned to Q8_0, which it cannot have" in text
    assert "tensor blk.1.ffn_down.weight: no type is left of IQ2_XXS" in text
