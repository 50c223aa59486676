"""A child program that scores texts; see :mod:`quant.core.child`.

It calls the llama.cpp of the lock file through llama-cpp-python, and does what llama-perplexity
does (``perplexity`` and ``kl_divergence`` in upstream's tools/perplexity/perplexity.cpp):

- the text is cut into chunks of ``context`` tokens n, each read with an empty KV cache, the first
  token replaced by BOS where the vocabulary adds one;
- only the second half of a chunk is predicted, the tokens n/2 + 1 to n - 1, so that every
  prediction has at least half a context before it: 255 of 512.

llama-perplexity itself is not used. It tokenizes without special tokens, so a chat's control tokens
would be read as plain text. Its base file keeps 16 bits for every token of the vocabulary: 78 MB a
chunk of GLM-4.6. And now and then the last lines of its output, which have the result, are lost.

Of the base, the k most likely tokens are kept (``top``), and the rest is one event; see
:func:`compute_kld`.
"""

import json
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.core import child
from quant.core.errors import InputError
from quant.llama.model import LoadedModel, Numbers

SMALLEST_REST = 1e-12
"""Lower bound of the rest's probability: computed in float32, a negligible one can be negative."""
ABOUT = "about.json"
"""What the base's run leaves: how many chunks it read, and the size of its vocabulary."""


def select_targets(tokens: NDArray[np.int32], context: int) -> NDArray[np.int32]:
    """Return the tokens that are predicted, the last axis cut to the second half of a chunk."""
    return tokens[..., context // 2 + 1 :]


def score_base(model: LoadedModel, tokens: NDArray[np.int32], top: int, folder: Path) -> None:
    """Write the base's log-probabilities of its most likely tokens, and its loss on the text.

    The names of the files are those of the store's finished work; with other names, old work could
    not be read.

    Args:
        model: The base.
        tokens: The text, a row for each chunk.
        top: How many tokens are kept for each prediction; all if the vocabulary is not larger.
        folder: Where the arrays go.
    """
    chunks, targets = len(tokens), model.context - 1 - model.context // 2
    kept = min(top, model.vocab_size)
    # Mapped: a text of 80 chunks with all of GLM-4.6's vocabulary takes 25 GB.
    ids = np.lib.format.open_memmap(folder / "words.npy", "w+", np.int32, (chunks, targets, kept))
    kept_log_p = np.lib.format.open_memmap(folder / "said.npy", "w+", np.float32, ids.shape)
    best = np.zeros((chunks, targets), np.int32)
    nll = np.zeros((chunks, targets), np.float32)
    for n, row in enumerate(tokens):
        log_p = model.log_probabilities(row)
        # argmax takes the first of equal values, here and in score_against_base: equal weights
        # agree at every token.
        best[n] = log_p.argmax(1)
        if kept == model.vocab_size:
            ids[n], kept_log_p[n] = np.arange(model.vocab_size), log_p
        else:
            # A partition, not a sort: nothing depends on the order of what is kept.
            ids[n] = np.argpartition(-log_p, kept - 1, axis=1)[:, :kept]
            kept_log_p[n] = np.take_along_axis(log_p, ids[n], 1)
        # Stored apart: the text's own token may not be among those that are kept.
        nll[n] = -log_p[np.arange(targets), select_targets(row, model.context)]
    ids.flush()
    kept_log_p.flush()
    for name, values in (("tokens", tokens), ("first", best), ("base_nll", nll)):
        np.save(folder / f"{name}.npy", values)


def score_against_base(model: LoadedModel, base: Path, folder: Path) -> None:
    """Write KLD, loss and top-1 agreement for every predicted token.

    Args:
        model: The file to be measured.
        base: The folder that :func:`score_base` filled.
        folder: Where the arrays go, each with a row for each chunk.
    """
    tokens, ids, kept_log_p, best = (
        np.load(base / f"{name}.npy", mmap_mode="r")
        for name in ("tokens", "words", "said", "first")
    )
    kld, nll = np.zeros(ids.shape[:2], np.float32), np.zeros(ids.shape[:2], np.float32)
    same = np.zeros(ids.shape[:2], bool)
    whole = ids.shape[2] == model.vocab_size  # then the rest is empty, and KLD exact
    for n, row in enumerate(tokens):
        log_q = model.log_probabilities(row)
        nll[n] = -log_q[np.arange(len(log_q)), select_targets(row, model.context)]
        same[n] = log_q.argmax(1) == best[n]
        kept_log_q = log_q if whole else np.take_along_axis(log_q, ids[n], 1)
        kld[n] = compute_kld(kept_log_p[n], kept_log_q, whole=whole)
    for name, values in (("kld", kld), ("nll", nll), ("same_top", same)):
        np.save(folder / f"{name}.npy", values)


def compute_kld(log_p: Numbers, log_q: Numbers, *, whole: bool) -> Numbers:
    """Return the Kullback-Leibler divergence of q from p for each row, in nats.

    With the whole vocabulary it is ``sum_i p_i (log p_i - log q_i)``. With the k tokens that are
    most likely under p, all others are merged into one event of probability ``r = 1 - sum_i p_i``
    (and s of q):

        KLD' = sum_{i<=k} p_i (log p_i - log q_i) + r (log r - log s)

    By the log-sum inequality KLD' <= KLD. What is lost is ``r KL(p | rest || q | rest)``: the
    divergence within the rest, times the probability of the rest. So a result is a lower bound,
    close where r is small.

    Args:
        log_p: Log-probabilities of the base; a row for each prediction, a column for each kept
            token.
        log_q: The file's, of the same tokens.
        whole: Whether the columns are the whole vocabulary.
    """
    # The sum in float64: terms of both signs cancel, and a good file's KLD is 1e-3 of them.
    kld = np.einsum("tw,tw->t", np.exp(log_p), log_p - log_q, dtype=np.float64)
    if not whole:
        rest_p, rest_q = (
            np.maximum(1 - np.exp(x).sum(1, dtype=np.float64), SMALLEST_REST)
            for x in (log_p, log_q)
        )
        kld += rest_p * np.log(rest_p / rest_q)
    # A divergence is never negative, but float32 log-probabilities do not sum to 1 exactly.
    result: Numbers = np.maximum(kld, 0).astype(np.float32)
    return result


def score_job(job: Mapping[str, Any], _: Path) -> None:
    """Run a job, whose parts name a model and either a text (it is the base) or a base.

    Consecutive parts with one model load it once.
    """
    for path, parts in groupby(job["parts"], key=itemgetter("model")):
        model = LoadedModel(path, job["context"], job["threads"])
        for part in parts:
            folder = Path(part["folder"])
            if "base" in part:
                base = Path(part["base"])
                # The size of the vocabulary; the key is that of finished work in the store.
                words = json.loads((base / ABOUT).read_text())["words"]
                if model.vocab_size != words:
                    raise InputError(
                        f"{path}: of another model: expected {words} tokens in the vocabulary,"
                        f" found {model.vocab_size}"
                    )
                score_against_base(model, base, folder)
            else:
                tokens = model.tokenize_chunks(Path(part["text"]).read_bytes())[: job["chunks"]]
                # A text shorter than one chunk leaves no arrays. The parent reports it.
                if len(tokens):
                    score_base(model, tokens, job["top"], folder)
                about = {"chunks": len(tokens), "words": model.vocab_size}
                (folder / ABOUT).write_text(json.dumps(about))
        # Before the next one is loaded: memory may not hold two.
        model.close()


if __name__ == "__main__":
    child.run_job(score_job)
