"""Token scores and files that are made up."""

from collections.abc import Callable

import numpy as np
import pytest

from quant.evaluate.html import ReportFile
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


FIGURES = {
    "ppl": 10.0,
    "kld_median": 0.1,
    "kld_p99": 0.5,
    "kld_p999": 1.0,
    "kld_max": 2.0,
    "top1": 0.9,
    "errors": {"ffn_gate_inp": 0.0, "attn_q": 0.0834567, "token_embd": 0.0021},
}
TENSORS = {
    "token_embd.weight": "Q4_K",
    "blk.0.attn_q.weight": "Q2_K",
    "blk.1.attn_q.weight": "Q6_K",
    "blk.1.ffn_gate_inp.weight": "F32",
    "output_norm.weight": "F32",
}


def make_report_file(
    name: str,
    size: int,
    kld: float,
    *,
    peer: bool = False,
    domains: tuple[str, ...] = ("code", "chat"),
) -> ReportFile:
    """A file with two matrices in two layers, and the same figures in every domain."""
    figures = FIGURES | {"kld_mean": kld, "kld_mean_low": kld / 2, "kld_mean_high": 2 * kld}
    return ReportFile(
        name, size, {**figures, "domains": dict.fromkeys(domains, figures)}, TENSORS, peer=peer
    )
