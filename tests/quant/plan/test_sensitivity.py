"""Sensitivities: what probes say is found again, noise is not believed, and files say whose they are."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quant.errors import InputError
from quant.evaluate.probe import list_probes
from quant.plan import sensitivity
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model
from quant.plan.priors import make_typical_errors
from quant.plan.sensitivity import (
    ProbeResult,
    Sensitivities,
    find_additive_tensors,
    fit_sensitivities,
    refit_sensitivities,
)

TINY = list_tensors(load_model("tiny-glm")[0].architecture)
GLM = list_tensors(load_model("glm-4.6")[0].architecture)
ERRORS = make_typical_errors(TINY)
GLM_BLOCKS = {int(t.name.split(".")[1]) for t in GLM if t.name.startswith("blk.")}
MTP = {int(t.name.split(".")[1]) for t in GLM if ".nextn." in t.name}
RNG = np.random.default_rng(3)
TRUTH = Sensitivities(
    ERRORS.base,
    "made up",
    {name: math.exp(RNG.normal(-4, 1)) for name in ERRORS.errors},
    power=0.75,
)


def measured(noise: float, truth: Sensitivities = TRUTH) -> list[ProbeResult]:
    rng = np.random.default_rng(5)
    return [
        ProbeResult(p, kld * math.exp(rng.normal(0, noise)), kld * noise)
        for p in list_probes(TINY, ERRORS)
        for kld in [truth.predicted(p.types, ERRORS)]
    ]


def test_exact_probes_give_the_truth_again() -> None:
    found = fit_sensitivities(measured(0), ERRORS, "made up")
    assert found.power == pytest.approx(TRUTH.power, rel=1e-3)
    for name, scale in found.scales.items():
        # Classes of few tensors, such as those of the last block, are drawn together a little.
        assert scale == pytest.approx(TRUTH.scales[name], rel=0.08), name


def test_what_follows_the_last_router_is_added_plainly() -> None:
    last = {
        f"blk.3.ffn_{part}{kind}.weight"
        for part in ("gate", "up", "down")
        for kind in ("_exps", "_shexp")
    }
    assert TRUTH.plain == last | {"output.weight"}
    trunk, further = max(GLM_BLOCKS - MTP), max(MTP)
    found = find_additive_tensors(t.name for t in GLM)
    assert f"blk.{trunk}.ffn_down_exps.weight" in found
    assert not {n for n in found if n.startswith((f"blk.{further}.", f"blk.{trunk}.attn", "token"))}


def test_twice_the_noise_behind_the_last_router_is_twice_the_divergence() -> None:
    for name, factor in (("blk.3.ffn_down_exps.weight", 2), ("blk.3.attn_output.weight", 2**0.75)):
        coarse, fine = ({name: k} for k in ("Q2_K", "IQ3_XXS"))
        ratio = ERRORS.errors[name]["Q2_K"].share / ERRORS.errors[name]["IQ3_XXS"].share
        told = TRUTH.predicted(coarse, ERRORS) / TRUTH.predicted(fine, ERRORS)
        assert told == pytest.approx(factor ** math.log2(ratio))


def test_noise_draws_tensors_toward_their_class() -> None:
    alike = replace(TRUTH, scales=dict.fromkeys(TRUTH.scales, 0.02))
    noisy = measured(0.8, alike)
    believed = fit_sensitivities([replace(m, deviation=1e-9) for m in noisy], ERRORS, "made up")
    found = fit_sensitivities(noisy, ERRORS, "made up")

    def spread(s: Sensitivities) -> float:
        by_part = [[s.scales[f"blk.{n}.attn_{part}.weight"] for n in range(4)] for part in "qkv"]
        return float(np.log(by_part).std(axis=1).mean())

    assert spread(found) < 0.9 * spread(believed)


def test_a_tensor_that_no_probe_held_is_like_its_class() -> None:
    some = [m for m in measured(0) if "blk.2.attn_q.weight" not in m.probe.types]
    like = [fit_sensitivities(some, ERRORS, "x").scales[f"blk.{n}.attn_q.weight"] for n in range(4)]
    assert like[2] == pytest.approx(math.exp(np.log([like[0], like[1], like[3]]).mean()))
    with pytest.raises(InputError, match=r"no probe held token_embd\.weight or one like it"):
        fit_sensitivities(
            [m for m in some if "token_embd.weight" not in m.probe.types], ERRORS, "x"
        )


def test_whole_files_mend_a_class_that_the_probes_misjudged() -> None:
    wrong = {n: v * (3 if "_exps" in n else 1) for n, v in TRUTH.scales.items()}
    whole = [
        {n: k if k in e else "Q2_K" for n, e in ERRORS.errors.items()}
        for k in ("IQ1_S", "IQ2_S", "IQ3_S", "Q4_K", "Q6_K")
    ]
    seen = [(types, TRUTH.predicted(types, ERRORS)) for types in whole]
    before = replace(TRUTH, scales=wrong)
    after = refit_sensitivities(before, seen, ERRORS)
    for types, kld in seen:
        assert abs(math.log(after.predicted(types, ERRORS) / kld)) < abs(
            math.log(before.predicted(types, ERRORS) / kld)
        )
    assert "refitted on 5 whole files" in after.source


def test_what_is_added_plainly_is_mended_apart_from_its_class() -> None:
    last, other = (f"blk.{n}.ffn_down_exps.weight" for n in (3, 2))
    wrong = replace(TRUTH, scales={**TRUTH.scales, last: TRUTH.scales[last] * 30})
    fine = {n: "Q6_K" if "Q6_K" in e else "Q8_0" for n, e in ERRORS.errors.items()}
    seen = [
        (types, TRUTH.predicted(types, ERRORS))
        for k in ("IQ2_S", "IQ3_S", "Q4_K")
        for types in [fine | {last: k}]
    ]
    after = refit_sensitivities(wrong, seen * 3, ERRORS)
    assert after.scales[last] < 0.5 * wrong.scales[last]
    assert after.scales[other] > 0.95 * wrong.scales[other]


def test_whole_files_mend_a_single_tensor_and_the_near_ones_count_more() -> None:
    name = "blk.2.attn_v.weight"
    wrong = replace(TRUTH, scales={**TRUTH.scales, name: TRUTH.scales[name] / 4})
    plain = {n: k if k in e else "Q2_K" for n, e in ERRORS.errors.items() for k in ("IQ3_S",)}
    whole = [plain | {name: k} for k in ("IQ1_S", "IQ2_S", "Q4_K", "Q8_0")]
    seen = [(types, TRUTH.predicted(types, ERRORS)) for types in whole] * 5
    assert refit_sensitivities(wrong, seen, ERRORS).scales[name] > 1.2 * wrong.scales[name]
    low = [(dict.fromkeys(ERRORS.errors, "Q6_K"), 9.0)]
    near, anywhere = (
        refit_sensitivities(TRUTH, [*seen, *low], ERRORS, near=near) for near in (seen[0][1], None)
    )
    off_near, off = (
        abs(math.log(s.predicted(whole[0], ERRORS) / seen[0][1])) for s in (near, anywhere)
    )
    assert off_near < off


def test_damage_is_the_tangent_of_what_is_predicted() -> None:
    types = dict.fromkeys(ERRORS.errors, "Q4_K")
    inside, _ = TRUTH.noise(types, ERRORS)
    finer = types | {"blk.1.attn_q.weight": "Q5_K"}
    told = TRUTH.damage(ERRORS, inside)["blk.1.attn_q.weight"]
    assert told["Q4_K"] - told["Q5_K"] == pytest.approx(
        TRUTH.predicted(types, ERRORS) - TRUTH.predicted(finer, ERRORS), rel=0.05
    )


def test_tensors_that_are_kept_make_no_noise() -> None:
    assert TRUTH.predicted(dict.fromkeys(ERRORS.errors, "BF16"), ERRORS) == 0


def test_they_are_read_as_written_and_only_for_their_model(tmp_path: Path) -> None:
    found = fit_sensitivities(measured(0.1), ERRORS, "made up")
    sensitivity.write_sensitivities(tmp_path / "s.json", found)
    assert sensitivity.read_sensitivities(tmp_path / "s.json", ERRORS.base) == found
    with pytest.raises(
        InputError, match="of another model: its base is prior…, this one is 000000000000…"
    ):
        sensitivity.read_sensitivities(tmp_path / "s.json", "0" * 64)
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(InputError, match="expected sensitivities"):
        sensitivity.read_sensitivities(tmp_path / "s.json")
