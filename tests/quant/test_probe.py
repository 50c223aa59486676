"""Probes: which tensors are coarse in which file, and how machines share them."""

import pytest

from quant.errors import InputError
from quant.inventory import inventory
from quant.priors import typical
from quant.probe import probes, share
from quant.recipe import load_model
from quant.sensitivity import Measured, Sensitivities, fit

TINY = inventory(load_model("tiny-glm")[0].architecture)
GLM = inventory(load_model("glm-4.6")[0].architecture)
ERRORS = typical(TINY)


def test_a_small_model_is_probed_tensor_by_tensor_and_a_large_one_by_class_and_depth() -> None:
    assert all(len(p.types) == 1 for p in probes(TINY, ERRORS))
    found = probes(GLM, typical(GLM), ["IQ2_XXS"])
    assert len(found) < 60
    assert sum(len(p.types) for p in found) == len(typical(GLM).errors)
    assert any(p.name == "ffn_down_exps band 2 of 4 at IQ2_XXS" for p in found)


def test_a_huge_model_is_probed_with_about_forty_files_that_tell_the_power_too() -> None:
    errors = typical(GLM)
    found = probes(GLM, errors, cheap=True)
    assert 35 <= len(found) <= 45
    assert not any(name.startswith("blk.92.attn") for p in found for name in p.types)
    truth = Sensitivities(errors.base, "made up", dict.fromkeys(errors.errors, 0.01), power=0.7)
    told = [Measured(p, kld, 0.01 * kld) for p in found for kld in [truth.predicted(p.types, errors)]]
    fitted = fit(told, errors, "made up")
    assert fitted.power == pytest.approx(0.7, rel=0.02)
    assert fitted.scales.keys() == errors.errors.keys()


def test_parts_hold_every_probe_once() -> None:
    every = probes(TINY, ERRORS)
    parts = [share(every, f"{n}/3") for n in (1, 2, 3)]
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in every)
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(InputError, match="as in 1/3"):
            share(every, wrong)


def test_a_tensor_without_importance_is_probed_with_a_type_that_needs_none() -> None:
    assert all(
        set(p.types.values()) <= {"Q2_K", "IQ3_S", "Q4_K"} for p in probes(TINY, ERRORS) if "output.weight" in p.types
    )
