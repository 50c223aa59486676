"""The prediction: what is amplified and what is added, its tangent, and the file on disk."""

import math
from pathlib import Path

import pytest

from quant.core.errors import InputError
from quant.llama.tensors import split_block
from quant.plan.sensitivity import (
    Probe,
    ProbeResult,
    Sensitivities,
    find_additive_tensors,
    read_sensitivities,
    write_sensitivities,
)
from tests.quant.plan.conftest import make_inputs
from tests.quant.plan.test_fit import ERRORS, TRUTH

GLM = make_inputs("glm-4.6").tensors
GLM_BLOCKS = {n for t in GLM if (n := split_block(t.name)[0]) is not None}
MTP_BLOCKS = {n for t in GLM if ".nextn." in t.name and (n := split_block(t.name)[0])}


def test_the_error_behind_the_last_router_is_additive() -> None:
    last = {
        f"blk.3.ffn_{part}{kind}.weight"
        for part in ("gate", "up", "down")
        for kind in ("_exps", "_shexp")
    }
    assert TRUTH.additive == last | {"output.weight"}


def test_mtp_blocks_are_not_the_last_block() -> None:
    trunk, mtp = max(GLM_BLOCKS - MTP_BLOCKS), max(MTP_BLOCKS)
    additive = find_additive_tensors(t.name for t in GLM)
    assert f"blk.{trunk}.ffn_down_exps.weight" in additive
    others = (f"blk.{mtp}.", f"blk.{trunk}.attn", "token")
    assert not {n for n in additive if n.startswith(others)}


@pytest.mark.parametrize(
    ("name", "factor"),
    [("blk.3.ffn_down_exps.weight", 2), ("blk.3.attn_output.weight", 2**0.75)],
)
def test_twice_the_error_is_twice_the_kld_only_if_it_is_additive(name: str, factor: float) -> None:
    coarse, fine = ({name: k} for k in ("Q2_K", "IQ3_XXS"))
    errors = ERRORS.errors[name]
    ratio = errors["Q2_K"].relative_mse / errors["IQ3_XXS"].relative_mse
    predicted = TRUTH.predict_kld(coarse, ERRORS) / TRUTH.predict_kld(fine, ERRORS)
    assert predicted == pytest.approx(factor ** math.log2(ratio))


def test_the_linearized_kld_is_the_tangent_of_the_prediction() -> None:
    types = dict.fromkeys(ERRORS.errors, "Q4_K")
    amplified, _ = TRUTH.sum_errors(types, ERRORS)
    finer = types | {"blk.1.attn_q.weight": "Q5_K"}
    added = TRUTH.linearize(ERRORS, amplified)["blk.1.attn_q.weight"]
    difference = TRUTH.predict_kld(types, ERRORS) - TRUTH.predict_kld(finer, ERRORS)
    assert added["Q4_K"] - added["Q5_K"] == pytest.approx(difference, rel=0.05)


def test_unquantized_tensors_have_no_error() -> None:
    assert TRUTH.predict_kld(dict.fromkeys(ERRORS.errors, "BF16"), ERRORS) == 0


def test_sensitivities_are_read_as_written_and_only_for_their_model(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    probe = Probe("one", {"output.weight": "Q2_K"})
    written = Sensitivities(
        base=ERRORS.base,
        source="made up",
        scales=dict(TRUTH.scales),
        power=0.7,
        probes=(ProbeResult(probe, 0.1, 0.01),),
    )
    write_sensitivities(path, written)
    assert read_sensitivities(path, ERRORS.base) == written
    message = "of another model: its base is prior…, this one is 000000000000…"
    with pytest.raises(InputError, match=message):
        read_sensitivities(path, "0" * 64)
    path.write_text("{}")
    with pytest.raises(InputError, match="expected sensitivities"):
        read_sensitivities(path)
