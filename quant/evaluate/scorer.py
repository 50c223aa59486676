"""A program: read a text with a model by llama.cpp, and keep what it says to every token, or how far that is from a base.

``python -m quant.evaluate.scorer JOB.json``.
It calls the llama.cpp of the lock file through the bindings that come with it, not
llama-perplexity: that one does not see a chat's special tokens, keeps 78 MB for 512 tokens of GLM's vocabulary, and now
and then loses the last lines of what it prints. Each chunk of tokens begins with an empty memory, and the second half of
it is predicted, as llama-perplexity has it. Of the base the likeliest words are kept, and the rest as one.
"""

import json
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.llama.model import LoadedModel, Numbers

QUIET = 1e-12
"""Of the probability, less than this is none."""
ABOUT = "about.json"
"""What is told of a base: how many chunks it read, and how many words it knows."""


def predicted_tokens(tokens: NDArray[np.int32], context: int) -> NDArray[np.int32]:
    """The words that have to be predicted."""
    return tokens[..., context // 2 + 1 :]


def score_base(scorer: LoadedModel, tokens: NDArray[np.int32], top: int, folder: Path) -> None:
    """Write what the base says: the likeliest words of each token, how likely they are, and what came."""
    shape = (len(tokens), scorer.context - 1 - scorer.context // 2, min(top, scorer.words))
    words = np.lib.format.open_memmap(folder / "words.npy", "w+", np.int32, shape)
    said = np.lib.format.open_memmap(folder / "said.npy", "w+", np.float32, shape)
    first, nll = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], np.float32)
    for n, row in enumerate(tokens):
        found = scorer.log_probabilities(row)
        first[n] = found.argmax(1)
        if shape[2] == scorer.words:
            words[n], said[n] = np.arange(scorer.words), found
        else:
            words[n] = np.argpartition(-found, shape[2] - 1, axis=1)[:, : shape[2]]
            said[n] = np.take_along_axis(found, words[n], 1)
        nll[n] = -found[np.arange(shape[1]), predicted_tokens(row, scorer.context)]
    words.flush()
    said.flush()
    for name, values in (("tokens", tokens), ("first", first), ("base_nll", nll)):
        np.save(folder / f"{name}.npy", values)


def score_against_base(scorer: LoadedModel, base: Path, folder: Path) -> None:
    """Write, for every token that is predicted, how far the model is from its base."""
    tokens, words, said, first = (
        np.load(base / f"{name}.npy", mmap_mode="r")
        for name in ("tokens", "words", "said", "first")
    )
    kld, nll = np.zeros(words.shape[:2], np.float32), np.zeros(words.shape[:2], np.float32)
    same = np.zeros(words.shape[:2], bool)
    for n, row in enumerate(tokens):
        found = scorer.log_probabilities(row)
        nll[n] = -found[np.arange(len(found)), predicted_tokens(row, scorer.context)]
        same[n] = found.argmax(1) == first[n]
        whole = words.shape[2] == scorer.words
        kld[n] = divergence(
            said[n], found if whole else np.take_along_axis(found, words[n], 1), whole=whole
        )
    for name, values in (("kld", kld), ("nll", nll), ("same_top", same)):
        np.save(folder / f"{name}.npy", values)


def divergence(p: Numbers, q: Numbers, *, whole: bool) -> Numbers:
    """Kullback-Leibler divergence by rows, in nats; words that are not there count as one, unless all are."""
    kld = np.einsum("tw,tw->t", np.exp(p), p - q, dtype=np.float64)
    if not whole:
        rest, other = (np.maximum(1 - np.exp(x).sum(1, dtype=np.float64), QUIET) for x in (p, q))
        kld += rest * np.log(rest / other)
    found: Numbers = np.maximum(kld, 0).astype(np.float32)  # below nothing only by rounding
    return found


def main(path: Path) -> None:
    """Do what a job says: each model is loaded once for all that it has to read."""
    job = json.loads(path.read_text())
    for model, parts in groupby(job["parts"], key=itemgetter("model")):
        scorer = LoadedModel(model, job["context"], job["threads"])
        for part in parts:
            if "base" in part:
                base = Path(part["base"])
                if scorer.words != (words := json.loads((base / ABOUT).read_text())["words"]):
                    raise SystemExit(
                        f"{model}: expected {words} words, found {scorer.words}: of another model"
                    )
                score_against_base(scorer, base, Path(part["folder"]))
            else:
                folder = Path(part["folder"])
                tokens = scorer.tokens(Path(part["text"]).read_bytes())[: job["chunks"]]
                if len(tokens):
                    score_base(scorer, tokens, job["top"], folder)
                (folder / ABOUT).write_text(
                    json.dumps({"chunks": len(tokens), "words": scorer.words})
                )
        scorer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
