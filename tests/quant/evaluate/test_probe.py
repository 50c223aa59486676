"""Probes: which tensors are coarse in which file, and how machines share the work."""

import pytest

from quant.core.errors import InputError
from quant.evaluate.probe import list_probes, select_part
from quant.plan.fit import fit_sensitivities
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model
from quant.plan.priors import make_typical_errors
from quant.plan.sensitivity import ProbeResult, Sensitivities

TINY = list_tensors(load_model("tiny-glm")[0].architecture)
GLM = list_tensors(load_model("glm-4.6")[0].architecture)
ERRORS = make_typical_errors(TINY)


def test_a_small_model_is_probed_tensor_by_tensor_and_a_large_one_by_class_and_depth() -> None:
    assert all(len(p.types) == 1 for p in list_probes(TINY, ERRORS))
    probes = list_probes(GLM, make_typical_errors(GLM), ["IQ2_XXS"])
    assert len(probes) < 60
    assert sum(len(p.types) for p in probes) == len(make_typical_errors(GLM).errors)
    assert any(p.name == "ffn_down_exps band 2 of 4 at IQ2_XXS" for p in probes)


def test_about_forty_probes_of_a_huge_model_are_enough_to_fit_the_power() -> None:
    errors = make_typical_errors(GLM)
    probes = list_probes(GLM, errors, cheap=True)
    assert 35 <= len(probes) <= 45
    assert not any(name.startswith("blk.92.attn") for p in probes for name in p.types)
    truth = Sensitivities(errors.base, "made up", dict.fromkeys(errors.errors, 0.01), power=0.7)
    klds = [truth.predict_kld(p.types, errors) for p in probes]
    results = [ProbeResult(p, kld, 0.01 * kld) for p, kld in zip(probes, klds, strict=True)]
    fitted = fit_sensitivities(results, errors, "made up")
    assert fitted.power == pytest.approx(0.7, rel=0.02)
    assert fitted.scales.keys() == errors.errors.keys()


def test_parts_have_every_probe_once() -> None:
    every = list_probes(TINY, ERRORS)
    parts = [select_part(every, f"{n}/3") for n in (1, 2, 3)]
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in every)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(InputError, match="as in 1/3"):
        select_part(list_probes(TINY, ERRORS), part)


def test_a_tensor_without_imatrix_data_is_probed_with_types_that_need_none() -> None:
    assert all(
        set(p.types.values()) <= {"Q2_K", "IQ3_S", "Q4_K"}
        for p in list_probes(TINY, ERRORS)
        if "output.weight" in p.types
    )
