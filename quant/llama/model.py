"""A model that is loaded in this process by the llama.cpp of the lock file.

The bindings (llama-cpp-python) load the same llama.cpp that this environment's tools are built
from. Importing them takes a second and loads native code, which prints and may abort; so only
child programs make a LoadedModel, and ``llama_cpp`` is imported late.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.core.errors import ToolError
from quant.llama import toolchain

LIBRARY = "LLAMA_CPP_LIB_PATH"
"""The environment variable that says where the bindings find libllama."""

Numbers: TypeAlias = NDArray[np.float32]
TensorCallback: TypeAlias = Callable[[int, bool, Any], bool]
"""Called with the address of a tensor of the computation (ggml_backend_sched_eval_callback).

If the second argument is true, it answers whether it wants the tensor; else the tensor's data are
there. False then ends the computation."""


class LoadedModel:
    """A loaded model and its context. Close it to free its memory."""

    def __init__(
        self, path: str, context: int, threads: int, callback: TensorCallback | None = None
    ) -> None:
        """Load a model.

        Args:
            path: The GGUF file, or its first shard.
            context: Tokens of a chunk. A chunk is evaluated in one batch.
            threads: Of the computation.
            callback: Called for every tensor that is computed.

        Raises:
            ToolError: llama.cpp cannot load the file or allocate the context.
        """
        find_bindings()
        import llama_cpp

        self._api: Any = llama_cpp
        self.context = context
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(
            path.encode(), self._api.llama_model_default_params()
        )
        if not self._model:
            raise ToolError(f"{path}: llama.cpp cannot load it")
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._api.llama_vocab_n_tokens(self._vocab)
        params = self._api.llama_context_default_params()
        # n_ubatch is 512 by default: a longer chunk would be computed in parts, and the callback
        # would get each tensor once a part.
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        if callback:
            # Kept in an attribute: llama.cpp calls it as long as the context lives.
            self._callback = self._api.ggml_backend_sched_eval_callback(callback)
            params.cb_eval = self._callback
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise ToolError(f"{path}: llama.cpp makes no context of {context} tokens for it")
        self._batch = self._api.llama_batch_init(context, 0, 1)

    def close(self) -> None:
        """Free the model's memory."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def tokenize(self, text: bytes) -> NDArray[np.int32]:
        """Return the token ids of a text, control tokens parsed, without BOS.

        This serves the chunks that this model reads. Everybody else counts with the user's own
        build (:mod:`quant.llama.tokenizer`, which says why); a test compares the two.
        """
        # A token takes at least one byte. SentencePiece vocabularies put a space before the text:
        # hence some more.
        capacity = len(text) + 8
        ids = (self._api.llama_token * capacity)()
        # add_special would put one BOS before the text; tokenize_chunks puts one in each chunk.
        add_special, parse_special = False, True
        count = self._api.llama_tokenize(
            self._vocab, text, len(text), ids, capacity, add_special, parse_special
        )
        if count < 0:  # minus the capacity that would do
            raise ToolError(f"llama.cpp cannot tokenize the text: llama_tokenize returned {count}")
        return np.array(ids[:count], np.int32)

    def tokenize_chunks(self, text: bytes) -> NDArray[np.int32]:
        """Return a text as chunks, of shape (chunks, context), without the rest that fills none.

        If the model wants BOS, it replaces the first token of every chunk, as llama-perplexity and
        llama-imatrix do.
        """
        ids = self.tokenize(text)
        chunks = ids[: len(ids) // self.context * self.context].reshape(-1, self.context)
        if self._api.llama_vocab_get_add_bos(self._vocab):
            chunks[:, 0] = self._api.llama_vocab_bos(self._vocab)
        return chunks

    def decode_chunk(self, tokens: NDArray[np.int32], outputs: range) -> None:
        """Evaluate a chunk from an empty context.

        Args:
            tokens: The chunk, ``context`` tokens.
            outputs: Positions whose logits are computed. Of the others, the last block computes
                only what later positions need.

        Raises:
            ToolError: llama.cpp gives up.
        """
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._batch.n_tokens = self.context
        for i, token in enumerate(tokens):
            self._batch.token[i], self._batch.pos[i] = int(token), i
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
            self._batch.logits[i] = i in outputs
        if code := self._api.llama_decode(self._context, self._batch):
            raise ToolError(f"llama.cpp cannot read the text: llama_decode returned {code}")

    def log_probabilities(self, tokens: NDArray[np.int32]) -> Numbers:
        """Evaluate a chunk and return the log-probabilities that predict its second half.

        The first half is only context, as llama-perplexity has it. With logits z, the row of a
        position is ``log softmax(z) = z - max(z) - log(sum(exp(z - max(z))))``.

        Args:
            tokens: The chunk, ``context`` tokens.

        Returns:
            An array of shape (context - 1 - context // 2, vocab_size). Row i predicts token
            ``context // 2 + 1 + i``.

        Raises:
            ToolError: llama.cpp gives up.
        """
        first = self.context // 2
        count = self.context - 1 - first
        self.decode_chunk(tokens, range(first, self.context - 1))
        shape = (count, self.vocab_size)
        # llama.cpp's buffer has a row for each flagged position, without gaps (llama_get_logits in
        # llama.h). The next decode overwrites it, so nothing returned may be a view of it.
        logits = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape)
        shifted = logits - logits.max(1, keepdims=True)
        # Summed in double: a vocabulary of 150,000 terms loses digits in single precision.
        sums = np.log(np.exp(shifted).sum(1, dtype=np.float64, keepdims=True)).astype(np.float32)
        return np.asarray(shifted - sums, np.float32)


def find_bindings() -> Path:
    """Return the folder of the libraries that the bindings load.

    It is this environment's, unless ``LLAMA_CPP_LIB_PATH`` names another.
    """
    # Set, not only read: llama_cpp looks for libllama there when it is imported. Our build of it
    # installs the libraries into the environment's lib, not into the package.
    return Path(os.environ.setdefault(LIBRARY, str(Path(sys.prefix) / "lib")))


def bindings_version() -> str:
    """Return the version of the llama.cpp that the bindings load, whatever tools the user named."""
    return str(toolchain.Toolchain(Path(sys.prefix) / "bin").version)
