"""Figures of a release: the digits that are told, what two machines may differ by, and what is nonsense."""

from pathlib import Path

import numpy as np
import pytest

from quant.evaluate.compare import Evaluation, Reading
from quant.evaluate.figures import (
    _nonsense,
    errors_by_class,
    figures_close,
    forecast_seconds,
    round_figure,
    round_figures,
)
from quant.plan.load import load_model
from quant.rebuild import measured_otherwise

TOLD = {"kld_mean": 0.1, "kld_mean_low": 0.09, "kld_mean_high": 0.11, "ppl": 10.0, "top1": 0.9}


def test_figures_keep_the_digits_that_do_not_change_from_machine_to_machine() -> None:
    told = round_figures(
        {
            "ppl": 12.34567,
            "kld_mean": 0.0123456,
            "top1": 0.912345,
            "chunks": 4000,
            "domains": {"a": {"kld_max": 1.23456}},
        }
    )
    assert told == {
        "ppl": 12.35,
        "kld_mean": 0.0123,
        "top1": 0.9123,
        "chunks": 4000,
        "domains": {"a": {"kld_max": 1.23}},
    }
    assert round_figure(0.0) == 0


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"kld_mean": 0.104}, True),
        ({"kld_mean": 0.12}, False),
        ({"ppl": 10.2}, False),
        ({"top1": 0.88}, False),
    ],
)
def test_two_machines_may_differ_by_a_little(change: dict[str, float], same: bool) -> None:
    assert figures_close(TOLD, TOLD | change) is same


def test_a_rebuild_allows_for_figures_and_for_nothing_else() -> None:
    def manifest(kld: float, name: str = "Q") -> dict[str, object]:
        variant = {"name": name, "bytes": 1, "evaluation": TOLD | {"kld_mean": kld}}
        return {
            "model": "m",
            "evaluation": {"context": 512, "base": {"ppl": kld}},
            "variants": [variant],
        }

    assert measured_otherwise(manifest(0.1), manifest(0.101)) == ("Q: KLD was 0.1, is 0.101",)
    assert measured_otherwise(manifest(0.1), manifest(0.1)) == ()
    assert measured_otherwise(manifest(0.1), manifest(0.2)) == ()
    assert measured_otherwise(manifest(0.1), manifest(0.101, "P")) == ()


def test_the_error_of_a_class_is_the_mean_of_its_matrices() -> None:
    told = {
        "output_norm.weight": 0.0,
        "blk.0.attn_q.bias": 0.0,
        "blk.0.attn_q.weight": 0.01,
        "blk.1.attn_q.weight": 0.03,
    }
    assert errors_by_class(told) == {"attn_q": pytest.approx(0.02)}


def test_only_what_is_further_off_than_the_recipe_allows_is_nonsense() -> None:
    def at(kld: float, nll: float) -> Evaluation:
        full = np.ones((4, 8), np.float32)
        return Evaluation(
            Path("f"), 1, {"a": Reading(full * kld, full * (1 + nll), full, full > 0)}
        )

    assert not [*_nonsense({"Q": at(2.9, 2.9)}, 3.0)]
    [said] = _nonsense({"Q": at(3.5, 0.0)}, 3.0)
    assert said.startswith(
        "Q: mean KLD is 3.50 nats, expected at most 3 (evaluation.worst of the recipe)"
    )
    [said] = _nonsense({"Q": at(0.5, 4.0)}, 3.0)
    assert "loss on the text" in said


def test_a_forecast_says_what_a_model_larger_than_the_memory_costs() -> None:
    model = load_model("glm-4.6")[0]
    assert "again for each chunk" not in forecast_seconds([10**8], 4, model)
    assert "13 files" not in forecast_seconds([10**8], 4, model)
    said = forecast_seconds([2**60], 4, model)
    assert "16 chunks" in said and "again for each chunk" in said
