"""What one file loses against its base, token by token, and the statistics of it. Pure.

Intervals are percentile bootstrap intervals over chunks (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13). The chunk is the unit that is resampled, because tokens of one
chunk are correlated: resampling tokens gives intervals that are several times too narrow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.core.errors import InputError

RESAMPLES = 1000
"""Bootstrap samples behind an interval."""
SEED = 7
"""Of the bootstrap. It is fixed, so that a rebuild ends in the same figures."""
LEVEL = 0.95
"""Confidence level of intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, in nats."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TokenScores:
    """One file against its base on one text, token by token.

    Arrays have a row for each chunk, and a column for each token of it that is predicted.
    """

    kld: NDArray[np.float32]
    """Kullback-Leibler divergence of the file from its base, in nats; 0 for the base itself."""
    nll: NDArray[np.float32]
    """Negative log-likelihood of the text's next token under the file, in nats."""
    base_nll: NDArray[np.float32]
    """The same under the base."""
    same_top: NDArray[np.bool_]
    """Whether the most likely token of both is the same."""


@dataclass(frozen=True)
class Evaluation:
    """One file against its base on the texts of one or several domains."""

    file: Path
    """The GGUF file, or its first shard."""
    bytes: int
    """Length of the file, or of all shards."""
    scores: Mapping[str, TokenScores]
    """By domain."""

    @cached_property
    def overall(self) -> TokenScores:
        """The scores of all domains as one: every chunk counts the same."""
        parts = list(self.scores.values())
        return TokenScores(
            kld=np.concatenate([p.kld for p in parts]),
            nll=np.concatenate([p.nll for p in parts]),
            base_nll=np.concatenate([p.base_nll for p in parts]),
            same_top=np.concatenate([p.same_top for p in parts]),
        )

    def figures(self) -> dict[str, Any]:
        """Return the figures of all domains together, and of each under ``domains``."""
        return compute_figures(self.overall) | {
            "domains": {name: compute_figures(s) for name, s in self.scores.items()}
        }

    def json(self) -> dict[str, Any]:
        """Return name, length and figures of the file, as ``quant evaluate --json`` prints them."""
        return {"file": self.file.name, "bytes": self.bytes, **self.figures()}


def compute_figures(scores: TokenScores) -> dict[str, Any]:
    """Return the figures of a file on a text, as plain JSON.

    Args:
        scores: What was measured, token by token.

    Returns:
        ``chunks``: how many were read. ``ppl`` and ``ppl_base``: perplexities. ``kld_mean``, its
        95 % interval ``kld_mean_low`` to ``kld_mean_high``, and ``kld_median``, ``kld_p99``,
        ``kld_p999`` and ``kld_max`` over tokens: in nats. ``top1``: the fraction of tokens, from 0
        to 1, at which the most likely token is the same.
    """
    kld, mean = scores.kld, estimate_mean(scores.kld)
    return {
        "chunks": len(kld),
        "ppl": compute_perplexity(scores),
        "ppl_base": float(np.exp(scores.base_nll.mean(dtype=np.float64))),
        "kld_mean": mean.value,
        "kld_mean_low": mean.low,
        "kld_mean_high": mean.high,
        # Quantiles have no interval: of 20 chunks with 255 tokens, only 5 tokens lie beyond 99.9 %,
        # too few to resample.
        "kld_median": float(np.median(kld)),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "kld_p999": float(np.quantile(kld, 0.999)),
        "kld_max": float(kld.max()),
        "top1": float(scores.same_top.mean()),
    }


def compute_perplexity(scores: TokenScores) -> float:
    """Return the file's perplexity: ``exp(mean(nll))`` over all predicted tokens."""
    return float(np.exp(scores.nll.mean(dtype=np.float64)))


def estimate_mean(values: NDArray[Any]) -> Estimate:
    """Return the mean of values and its bootstrap interval.

    Args:
        values: A row for each chunk, a column for each token.
    """
    # All chunks have the same number of tokens, so a mean of their means is that of the tokens.
    chunk_means = values.mean(1, dtype=np.float64)
    low, high = _bootstrap(chunk_means)
    return Estimate(float(values.mean(dtype=np.float64)), low, high)


def estimate_difference(first: TokenScores, second: TokenScores) -> Estimate:
    """Return the mean KLD of the second file less that of the first.

    The bootstrap is paired: a sample draws the same chunks for both files. What is hard for both
    then cancels, and two files can differ clearly although their own intervals overlap.

    Raises:
        InputError: If the two were not measured on the same text of the same base.
    """
    # The base's losses identify base and text, down to the token.
    if not np.array_equal(first.base_nll, second.base_nll):
        raise InputError(
            "two files can only be compared on the same text of the same base, found others"
        )
    gaps = second.kld.mean(1, dtype=np.float64) - first.kld.mean(1, dtype=np.float64)
    low, high = _bootstrap(gaps)
    return Estimate(float(gaps.mean()), low, high)


def _bootstrap(chunk_means: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the interval of a mean over chunks."""
    count = len(chunk_means)
    # Equal counts draw equal chunks: this is what pairs two files, and what a rebuild repeats.
    # numpy may change the generator's stream between versions (NEP 19); the lock file pins numpy.
    draws = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(chunk_means[draws].mean(1), tails)
    return float(low), float(high)
