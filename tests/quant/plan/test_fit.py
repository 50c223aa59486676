"""Fitting sensitivities: probes give the truth again, noise is shrunk, whole files refine."""

import math
from dataclasses import replace

import numpy as np
import pytest

from quant.core.errors import InputError
from quant.evaluate.probe import list_probes
from quant.plan.fit import fit_sensitivities, refit_sensitivities
from quant.plan.sensitivity import ProbeResult, Sensitivities
from tests.quant.plan.conftest import make_inputs

TINY = make_inputs("tiny-glm")
TENSORS, ERRORS = TINY.tensors, TINY.errors
RNG = np.random.default_rng(3)
TRUTH = Sensitivities(
    base=ERRORS.base,
    source="made up",
    scales={name: math.exp(RNG.normal(-4, 1)) for name in ERRORS.errors},
    power=0.75,
)


def run_probes(noise: float, truth: Sensitivities = TRUTH) -> list[ProbeResult]:
    """Return results of probes whose log KLD has the standard deviation ``noise``."""
    rng = np.random.default_rng(5)
    return [
        ProbeResult(p, kld * math.exp(rng.normal(0, noise)), kld * noise)
        for p in list_probes(TENSORS, ERRORS)
        for kld in [truth.predict_kld(p.types, ERRORS)]
    ]


def test_exact_probes_give_the_truth_again() -> None:
    fitted = fit_sensitivities(run_probes(0), ERRORS, "made up")
    assert fitted.power == pytest.approx(TRUTH.power, rel=1e-3)
    for name, scale in fitted.scales.items():
        # Classes of few tensors, such as those of the last block, are shrunk a little.
        assert scale == pytest.approx(TRUTH.scales[name], rel=0.08), name


def test_noisy_tensors_are_shrunk_toward_their_class() -> None:
    equal = replace(TRUTH, scales=dict.fromkeys(TRUTH.scales, 0.02))
    noisy = run_probes(0.8, equal)
    trusted = fit_sensitivities([replace(r, standard_error=1e-9) for r in noisy], ERRORS, "x")
    shrunk = fit_sensitivities(noisy, ERRORS, "x")

    def spread(s: Sensitivities) -> float:
        by_part = [[s.scales[f"blk.{n}.attn_{part}.weight"] for n in range(4)] for part in "qkv"]
        return float(np.log(by_part).std(axis=1).mean())

    assert spread(shrunk) < 0.9 * spread(trusted)


def test_an_unprobed_tensor_gets_the_mean_of_its_class() -> None:
    some = [r for r in run_probes(0) if "blk.2.attn_q.weight" not in r.probe.types]
    scales = fit_sensitivities(some, ERRORS, "x").scales
    others = [math.log(scales[f"blk.{n}.attn_q.weight"]) for n in (0, 1, 3)]
    assert scales["blk.2.attn_q.weight"] == pytest.approx(math.exp(np.mean(others)))


def test_a_class_without_any_probe_is_refused() -> None:
    some = [r for r in run_probes(0) if "token_embd.weight" not in r.probe.types]
    with pytest.raises(InputError, match=r"no probe of token_embd\.weight or of its class"):
        fit_sensitivities(some, ERRORS, "x")


def test_whole_files_correct_a_class_that_the_probes_misjudged() -> None:
    wrong = {n: v * (3 if "_exps" in n else 1) for n, v in TRUTH.scales.items()}
    whole = [
        {n: k if k in e else "Q2_K" for n, e in ERRORS.errors.items()}
        for k in ("IQ1_S", "IQ2_S", "IQ3_S", "Q4_K", "Q6_K")
    ]
    measured = [(types, TRUTH.predict_kld(types, ERRORS)) for types in whole]
    before = replace(TRUTH, scales=wrong)
    after = refit_sensitivities(before, measured, ERRORS)

    def miss(s: Sensitivities, types: dict[str, str], kld: float) -> float:
        return abs(math.log(s.predict_kld(types, ERRORS) / kld))

    assert all(miss(after, types, kld) < miss(before, types, kld) for types, kld in measured)
    assert "refitted on 5 whole files" in after.source


def test_an_additive_tensor_is_corrected_apart_from_its_class() -> None:
    last, other = (f"blk.{n}.ffn_down_exps.weight" for n in (3, 2))
    wrong = replace(TRUTH, scales={**TRUTH.scales, last: TRUTH.scales[last] * 30})
    fine = {n: "Q6_K" if "Q6_K" in e else "Q8_0" for n, e in ERRORS.errors.items()}
    files = [fine | {last: k} for k in ("IQ2_S", "IQ3_S", "Q4_K")]
    measured = [(types, TRUTH.predict_kld(types, ERRORS)) for types in files]
    after = refit_sensitivities(wrong, measured * 3, ERRORS)
    assert after.scales[last] < 0.5 * wrong.scales[last]
    assert after.scales[other] > 0.95 * wrong.scales[other]


def test_whole_files_correct_a_single_tensor_and_near_files_count_more() -> None:
    name = "blk.2.attn_v.weight"
    wrong = replace(TRUTH, scales={**TRUTH.scales, name: TRUTH.scales[name] / 4})
    rest = {n: "IQ3_S" if "IQ3_S" in e else "Q2_K" for n, e in ERRORS.errors.items()}
    files = [rest | {name: k} for k in ("IQ1_S", "IQ2_S", "Q4_K", "Q8_0")]
    measured = [(types, TRUTH.predict_kld(types, ERRORS)) for types in files] * 5
    refitted = refit_sensitivities(wrong, measured, ERRORS)
    assert refitted.scales[name] > 1.2 * wrong.scales[name]
    outlier = [(dict.fromkeys(ERRORS.errors, "Q6_K"), 9.0)]
    types, kld = measured[0]
    misses = {
        near: abs(math.log(s.predict_kld(types, ERRORS) / kld))
        for near in (kld, None)
        for s in [refit_sensitivities(TRUTH, [*measured, *outlier], ERRORS, near=near)]
    }
    assert misses[kld] < misses[None]
