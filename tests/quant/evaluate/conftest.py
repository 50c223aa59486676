"""Token scores that are made up."""

from collections.abc import Callable

import numpy as np
import pytest

from quant.evaluate.scores import TokenScores

MakeScores = Callable[..., TokenScores]


@pytest.fixture
def make_scores() -> MakeScores:
    """Scores with KLDs around a mean: ``make_scores(0.01, base_nll=1.0, chunks=40)``."""
    rng = np.random.default_rng(1)

    def make(kld: float, base_nll: float = 1.0, chunks: int = 40) -> TokenScores:
        values = rng.gamma(1, kld, (chunks, 255)).astype(np.float32)
        nll = np.full(values.shape, base_nll, np.float32)
        return TokenScores(values, nll, nll, values < kld)

    return make
