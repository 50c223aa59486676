"""A model loaded by the llama.cpp of the lock file, read chunk by chunk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.errors import ToolError
from quant.llama import toolchain

LIBRARY = "LLAMA_CPP_LIB_PATH"
"""Where the bindings look for libllama."""


Numbers = NDArray[np.float32]


Watch: TypeAlias = Callable[[int, bool, Any], bool]
"""Is asked of every tensor that is computed, by its address, whether it wants it, and called again when it is there."""


class LoadedModel:
    """One loaded model."""

    def __init__(self, path: str, context: int, threads: int, watch: Watch | None = None) -> None:
        os.environ.setdefault(LIBRARY, str(Path(sys.prefix) / "lib"))
        import llama_cpp

        self.c: Any = llama_cpp
        self.context = context
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(
            path.encode(), self.c.llama_model_default_params()
        )
        if not self.model:
            raise ToolError(f"{path}: llama.cpp cannot load it")
        self.vocab = self.c.llama_model_get_vocab(self.model)
        self.words = self.c.llama_vocab_n_tokens(self.vocab)
        settings = self.c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        if watch:  # which llama.cpp calls as long as the context lives
            settings.cb_eval = self.watch = self.c.ggml_backend_sched_eval_callback(watch)
        self.ctx = self.c.llama_init_from_model(self.model, settings)
        if not self.ctx:
            raise ToolError(f"{path}: llama.cpp makes no context of {context} tokens for it")
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
        rows = np.array(found[:count], np.int32)[: count // self.context * self.context].reshape(
            -1, self.context
        )
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
            raise ToolError(f"llama.cpp cannot read the text: llama_decode says {code}")

    def log_probabilities(self, row: NDArray[np.int32]) -> Numbers:
        """For each token that is predicted, a row: how likely each word was, as a logarithm."""
        first = self.context // 2
        count = self.context - 1 - first
        self.read(row, range(first, self.context - 1))
        logits = np.ctypeslib.as_array(self.c.llama_get_logits(self.ctx), (count, self.words))
        shifted = logits - logits.max(1, keepdims=True)
        sums = np.log(np.exp(shifted).sum(1, dtype=np.float64, keepdims=True)).astype(np.float32)
        return np.asarray(shifted - sums, np.float32)


def bindings_version() -> str:
    """The llama.cpp that reads the texts: that of the lock file, whichever tools are named."""
    return str(toolchain.Toolchain(Path(sys.prefix) / "bin").version)
