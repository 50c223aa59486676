"""The evaluation of a release: errors by class, broken files, what it will read, and its JSON."""

from pathlib import Path

import numpy as np
import pytest

from quant.evaluate.pareto import DominatedFile
from quant.evaluate.release import (
    ReleaseEvaluation,
    errors_by_class,
    find_broken,
    forecast_reading,
)
from quant.evaluate.scores import Estimate, Evaluation, TokenScores
from quant.plan.load import load_model


def test_the_error_of_a_class_is_the_mean_of_its_matrices() -> None:
    errors = {
        "output_norm.weight": 0.0,
        "blk.0.attn_q.bias": 0.0,
        "blk.0.attn_q.weight": 0.01,
        "blk.1.attn_q.weight": 0.03,
    }
    assert errors_by_class(errors) == {"attn_q": pytest.approx(0.02)}


def test_a_file_is_broken_if_its_kld_or_loss_exceeds_what_the_recipe_allows() -> None:
    def at(kld: float, nll: float) -> Evaluation:
        full = np.ones((4, 8), np.float32)
        scores = TokenScores(full * kld, full * (1 + nll), full, full > 0)
        return Evaluation(Path("f"), 1, {"a": scores})

    assert not [*find_broken({"Q": at(2.9, 2.9)}, 3.0)]
    [problem] = find_broken({"Q": at(3.5, 0.0)}, 3.0)
    assert problem.startswith(
        "Q: mean KLD is 3.50 nats, expected at most 3 (evaluation.worst of the recipe)"
    )
    [problem] = find_broken({"Q": at(0.5, 4.0)}, 3.0)
    assert "loss on the text" in problem


def test_a_forecast_names_the_cost_of_a_model_larger_than_the_memory() -> None:
    model = load_model("glm-4.6")[0]
    assert "again for each chunk" not in forecast_reading([10**8], 4, model)
    assert "13 files" not in forecast_reading([10**8], 4, model)
    line = forecast_reading([2**60], 4, model)
    assert "16 chunks" in line and "again for each chunk" in line


def test_the_manifest_keeps_its_keys() -> None:
    gap = Estimate(0.12345, 0.1, 0.2)
    dominated = (DominatedFile("UD-B", "UD-A", gap), DominatedFile("Q", "UD-A", gap))
    evaluation = ReleaseEvaluation(
        {"context": 512}, {"code": "ab"}, {"ppl": 9.0}, {}, dominated, ("maths",)
    )
    document = evaluation.json()
    assert document.keys() == {"context", "texts", "too_short", "base", "beaten"}
    assert [d["ladder"] for d in document["beaten"]] == [True, False]
    assert document["beaten"][1] == {
        "file": "Q",
        "by": "UD-A",
        "ladder": False,
        "kld_mean": 0.123,
        "kld_mean_low": 0.1,
        "kld_mean_high": 0.2,
        "said": "Q is dominated: UD-A is not larger and nearer to BF16; its KLD is higher by 0.123"
        " (0.1 to 0.2)",
    }
