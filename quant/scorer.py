"""A program: read a text with a model by llama.cpp, and keep what it says to every token, or how far that is from a base.

``python -m quant.scorer JOB.json``. It calls the llama.cpp of the lock file through the bindings that come with it, not
llama-perplexity: that one does not see a chat's special tokens, keeps 78 MB for 512 tokens of GLM's vocabulary, and now
and then loses the last lines of what it prints. Each chunk of tokens begins with an empty memory, and the second half of
it is predicted, as llama-perplexity has it. Of the base the likeliest words are kept, and the rest as one.
"""

import json
import os
import sys
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

LIBRARY = "LLAMA_CPP_LIB_PATH"
"""Where the bindings look for libllama."""
QUIET = 1e-12
"""Of the probability, less than this is none."""
ABOUT = "about.json"
"""What is told of a base: how many chunks it read, and how many words it knows."""
Numbers = NDArray[np.float32]
Watch: TypeAlias = Callable[[int, bool, Any], bool]
"""Is asked of every tensor that is computed, by its address, whether it wants it, and called again when it is there."""


class Scorer:
    """One loaded model."""

    def __init__(self, path: str, context: int, threads: int, watch: Watch | None = None) -> None:
        os.environ.setdefault(LIBRARY, str(Path(sys.prefix) / "lib"))
        import llama_cpp

        self.c: Any = llama_cpp
        self.context = context
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(path.encode(), self.c.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self.vocab = self.c.llama_model_get_vocab(self.model)
        self.words = self.c.llama_vocab_n_tokens(self.vocab)
        settings = self.c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        if watch:  # which llama.cpp calls as long as the context lives
            settings.cb_eval = self.watch = self.c.ggml_backend_sched_eval_callback(watch)
        self.ctx = self.c.llama_init_from_model(self.model, settings)
        if not self.ctx:
            raise SystemExit(f"{path}: llama.cpp makes no context of {context} tokens for it")
        self.batch = self.c.llama_batch_init(context, 0, 1)

    def close(self) -> None:
        """Give the memory back."""
        self.c.llama_batch_free(self.batch)
        self.c.llama_free(self.ctx)
        self.c.llama_model_free(self.model)

    def tokens(self, text: bytes) -> NDArray[np.int32]:
        """The text as rows of tokens, special ones seen as such; what does not fill a row is left out."""
        room = len(text) + 8
        found = (self.c.llama_token * room)()
        count = self.c.llama_tokenize(self.vocab, text, len(text), found, room, False, True)
        rows = np.array(found[:count], np.int32)[: count // self.context * self.context].reshape(-1, self.context)
        if self.c.llama_vocab_get_add_bos(self.vocab):
            rows[:, 0] = self.c.llama_vocab_bos(self.vocab)
        return rows

    def read(self, row: NDArray[np.int32], told: range) -> None:
        """Read a chunk with an empty memory, and reckon what follows those of its tokens that are in the range."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.ctx), True)
        self.batch.n_tokens = self.context
        for i, token in enumerate(row):
            self.batch.token[i], self.batch.pos[i] = int(token), i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = i in told
        if code := self.c.llama_decode(self.ctx, self.batch):
            raise SystemExit(f"llama.cpp cannot read the text: llama_decode says {code}")

    def log_probabilities(self, row: NDArray[np.int32]) -> Numbers:
        """For each token that is predicted, a row: how likely each word was, as a logarithm."""
        first = self.context // 2
        count = self.context - 1 - first
        self.read(row, range(first, self.context - 1))
        logits = np.ctypeslib.as_array(self.c.llama_get_logits(self.ctx), (count, self.words))
        shifted = logits - logits.max(1, keepdims=True)
        sums = np.log(np.exp(shifted).sum(1, dtype=np.float64, keepdims=True)).astype(np.float32)
        return np.asarray(shifted - sums, np.float32)


def targets(tokens: NDArray[np.int32], context: int) -> NDArray[np.int32]:
    """The words that have to be predicted."""
    return tokens[..., context // 2 + 1 :]


def keep(scorer: Scorer, tokens: NDArray[np.int32], top: int, folder: Path) -> None:
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
        nll[n] = -found[np.arange(shape[1]), targets(row, scorer.context)]
    words.flush()
    said.flush()
    for name, values in (("tokens", tokens), ("first", first), ("base_nll", nll)):
        np.save(folder / f"{name}.npy", values)


def compare(scorer: Scorer, base: Path, folder: Path) -> None:
    """Write, for every token that is predicted, how far the model is from its base."""
    tokens, words, said, first = (
        np.load(base / f"{name}.npy", mmap_mode="r") for name in ("tokens", "words", "said", "first")
    )
    kld, nll = np.zeros(words.shape[:2], np.float32), np.zeros(words.shape[:2], np.float32)
    same = np.zeros(words.shape[:2], bool)
    for n, row in enumerate(tokens):
        found = scorer.log_probabilities(row)
        nll[n] = -found[np.arange(len(found)), targets(row, scorer.context)]
        same[n] = found.argmax(1) == first[n]
        whole = words.shape[2] == scorer.words
        kld[n] = divergence(said[n], found if whole else np.take_along_axis(found, words[n], 1), whole=whole)
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
        scorer = Scorer(model, job["context"], job["threads"])
        for part in parts:
            if "base" in part:
                base = Path(part["base"])
                if scorer.words != (words := json.loads((base / ABOUT).read_text())["words"]):
                    raise SystemExit(f"{model}: expected {words} words, found {scorer.words}: of another model")
                compare(scorer, base, Path(part["folder"]))
            else:
                folder = Path(part["folder"])
                tokens = scorer.tokens(Path(part["text"]).read_bytes())[: job["chunks"]]
                if len(tokens):
                    keep(scorer, tokens, job["top"], folder)
                (folder / ABOUT).write_text(json.dumps({"chunks": len(tokens), "words": scorer.words}))
        scorer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
