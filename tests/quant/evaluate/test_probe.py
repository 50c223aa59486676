"""Probes: which tensors are coarse in which file, and how machines share them."""

import pytest

from quant.errors import InputError
from quant.evaluate.probe import list_probes, select_part
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model
from quant.plan.priors import make_typical_errors
from quant.plan.sensitivity import ProbeResult, Sensitivities, fit_sensitivities

TINY = list_tensors(load_model("tiny-glm")[0].architecture)
GLM = list_tensors(load_model("glm-4.6")[0].architecture)
ERRORS = make_typical_errors(TINY)


def test_a_small_model_is_probed_tensor_by_tensor_and_a_large_one_by_class_and_depth() -> None:
    assert all(len(p.types) == 1 for p in list_probes(TINY, ERRORS))
    found = list_probes(GLM, make_typical_errors(GLM), ["IQ2_XXS"])
    assert len(found) < 60
    assert sum(len(p.types) for p in found) == len(make_typical_errors(GLM).errors)
    assert any(p.name == "ffn_down_exps band 2 of 4 at IQ2_XXS" for p in found)


def test_a_huge_model_is_probed_with_about_forty_files_that_tell_the_power_too() -> None:
    errors = make_typical_errors(GLM)
    found = list_probes(GLM, errors, cheap=True)
    assert 35 <= len(found) <= 45
    assert not any(name.startswith("blk.92.attn") for p in found for name in p.types)
    truth = Sensitivities(errors.base, "made up", dict.fromkeys(errors.errors, 0.01), power=0.7)
    told = [
        ProbeResult(p, kld, 0.01 * kld) for p in found for kld in [truth.predicted(p.types, errors)]
    ]
    fitted = fit_sensitivities(told, errors, "made up")
    assert fitted.power == pytest.approx(0.7, rel=0.02)
    assert fitted.scales.keys() == errors.errors.keys()


def test_parts_hold_every_probe_once() -> None:
    every = list_probes(TINY, ERRORS)
    parts = [select_part(every, f"{n}/3") for n in (1, 2, 3)]
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in every)
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(InputError, match="as in 1/3"):
            select_part(every, wrong)


def test_a_tensor_without_importance_is_probed_with_a_type_that_needs_none() -> None:
    assert all(
        set(p.types.values()) <= {"Q2_K", "IQ3_S", "Q4_K"}
        for p in list_probes(TINY, ERRORS)
        if "output.weight" in p.types
    )
