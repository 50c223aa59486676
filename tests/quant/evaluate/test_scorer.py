"""The KLD of two distributions, of which the most likely tokens are kept."""

import numpy as np
import pytest

from quant.evaluate.scorer import compute_kld, select_targets

RNG = np.random.default_rng(1)


def test_tokens_that_are_not_kept_count_as_one_and_change_little() -> None:
    p = np.log(RNG.dirichlet(np.full(500, 0.05), 64) + 1e-12)
    q = p + RNG.normal(0, 0.3, p.shape)
    p, q = ((x - np.log(np.exp(x).sum(1, keepdims=True))).astype(np.float32) for x in (p, q))
    whole = compute_kld(p, q, whole=True)
    best = np.argsort(-p, axis=1)[:, :100]
    part = compute_kld(np.take_along_axis(p, best, 1), np.take_along_axis(q, best, 1), whole=False)
    assert (part <= whole + 1e-5).all()
    assert part.mean() == pytest.approx(whole.mean(), rel=0.05)


def test_what_is_lost_is_the_divergence_within_the_rest_times_its_probability() -> None:
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.2, 0.3])
    whole = float(compute_kld(np.log(p)[None], np.log(q)[None], whole=True)[0])
    part = float(compute_kld(np.log(p[:1])[None], np.log(q[:1])[None], whole=False)[0])
    within = sum(a / 0.4 * np.log((a / 0.4) / (b / 0.5)) for a, b in zip(p[1:], q[1:], strict=True))
    assert whole - part == pytest.approx(0.4 * within, rel=1e-4)


def test_a_model_does_not_diverge_from_itself() -> None:
    p = np.log(RNG.dirichlet(np.ones(50), 8)).astype(np.float32)
    assert (compute_kld(p, p, whole=True) == 0).all()


def test_the_second_half_of_a_chunk_is_predicted() -> None:
    chunk = np.arange(512, dtype=np.int32)
    targets = select_targets(chunk, 512)
    assert (len(targets), targets[0], targets[-1]) == (255, 257, 511)  # as llama-perplexity
