"""Statistics of token scores: figures, intervals, and the difference of two files."""

from pathlib import Path

import numpy as np
import pytest

from quant.core.errors import InputError
from quant.evaluate.scores import (
    Evaluation,
    TokenScores,
    compute_figures,
    estimate_difference,
    estimate_mean,
)
from tests.quant.evaluate.conftest import MakeScores


def test_the_interval_of_a_mean_is_as_wide_as_its_noise() -> None:
    values = np.random.default_rng(1).normal(1, 0.1, (100, 255))
    mean = estimate_mean(values)
    expected = 2 * 1.96 * values.mean(1).std() / 10
    assert mean.low < mean.value < mean.high
    assert mean.high - mean.low == pytest.approx(expected, rel=0.2)


def test_an_interval_is_always_the_same() -> None:
    mean = estimate_mean(np.sqrt(np.arange(60.0)).reshape(20, 3))
    # What the seed gave when the first releases were made: a rebuild compares with them.
    expected = (5.0960529541711415, 4.269624388979785, 5.861287204881657)
    assert (mean.value, mean.low, mean.high) == pytest.approx(expected, rel=1e-12)


def test_figures_are_those_of_all_tokens(make_scores: MakeScores) -> None:
    scores = make_scores(0.01)
    figures = compute_figures(scores)
    assert figures["kld_mean"] == pytest.approx(float(scores.kld.mean()), rel=1e-5)
    assert figures["kld_median"] <= figures["kld_p99"] <= figures["kld_p999"] <= figures["kld_max"]
    assert figures["ppl"] == pytest.approx(np.e)
    assert figures["top1"] == pytest.approx(float(scores.same_top.mean()))


def test_two_files_are_compared_on_the_same_chunks(make_scores: MakeScores) -> None:
    first = make_scores(0.01)
    better = TokenScores(first.kld * 0.98, first.nll, first.base_nll, first.same_top)
    gap = estimate_difference(first, better)
    assert gap.high < 0  # though the intervals of the two overlap by far
    assert estimate_mean(better.kld).high > estimate_mean(first.kld).low


def test_files_that_were_measured_on_different_texts_are_not_compared(
    make_scores: MakeScores,
) -> None:
    with pytest.raises(InputError, match="on the same text of the same base"):
        estimate_difference(make_scores(0.01), make_scores(0.01, base_nll=2.0))


def test_all_domains_together_weigh_each_chunk_alike(make_scores: MakeScores) -> None:
    few, many = make_scores(0.1, chunks=10), make_scores(0.2, chunks=30)
    evaluation = Evaluation(Path("x/q.gguf"), 7, {"chat": few, "code": many})
    document = evaluation.json()
    assert (document["file"], document["bytes"], document["chunks"]) == ("q.gguf", 7, 40)
    expected = (10 * few.kld.mean() + 30 * many.kld.mean()) / 40
    assert document["kld_mean"] == pytest.approx(float(expected), rel=1e-5)
    assert document["domains"]["code"] == compute_figures(many)
