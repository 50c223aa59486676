"""Count tokens as llama.cpp does, with the vocabulary of a GGUF file.

There is one way: llama-tokenize, of the toolchain that the user chose. The bindings that come with
this package could tokenize in process (:meth:`quant.llama.model.LoadedModel.tokenize` does), and
would save a process per text. They are not used here, because how a text is cut may differ between
builds: a pre-tokenizer is a regular expression in llama.cpp's source, and a user names another
llama.cpp (``--llama-cpp DIR``) just when his model needs a newer one. The calibration text is cut
to the chunks that his llama-imatrix will read, so his build has to count. A crash of native code
also ends only the child.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from quant.core import files
from quant.core.errors import InputError, ToolError
from quant.core.format import hash_texts, to_canonical_json
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain

CONTROL = 3
"""The type of control tokens, which no plain text is cut into (LLAMA_TOKEN_TYPE_CONTROL)."""


class TextCounter(Protocol):
    """Measures the length of texts."""

    @property
    def unit(self) -> str:
        """What is counted."""

    def count_each(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Return the length of each text."""


@dataclass(frozen=True)
class CharacterCounter:
    """Counts characters, where there is no model to tokenize with."""

    unit: ClassVar[str] = "characters"

    def count_each(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Return the number of characters of each text."""
        return tuple(map(len, texts))


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of one model, run by one toolchain."""

    file: ModelFile
    tools: Toolchain
    unit: ClassVar[str] = "tokens"

    @cached_property
    def digest(self) -> str:
        """A sha256 of everything that decides how a text is cut: the vocabulary and the build."""
        # The chat template has such a key too, and cuts no text: without it a patched template
        # keeps the counts that are stored under this digest.
        vocabulary = {
            key: value
            for key, value in self.file.metadata.items()
            if key.startswith("tokenizer.") and "template" not in key
        }
        return hash_texts([to_canonical_json(vocabulary), str(self.tools.version)])

    @property
    def adds_bos(self) -> bool:
        """Whether a token for the beginning (BOS) is put before every text."""
        return bool(self.file.metadata.get("tokenizer.ggml.add_bos_token", False))

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, BOS included. Raises as :meth:`tokenize`."""
        return len(self.tokenize(text))

    def count_each(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Return the number of tokens of each text by itself, without BOS.

        One process counts them all: the texts are joined by a control token that none of them
        contains. llama.cpp splits a text at control tokens before it tokenizes the parts
        (tokenizer_st_partition in src/llama-vocab.cpp), so no part depends on another.

        Raises:
            InputError: The vocabulary has no control token that the texts do not contain.
            ToolError: llama-tokenize fails.
        """
        if not texts:
            return ()
        separator = self._choose_separator(texts)
        # One BOS precedes the joined texts, if the model wants it: False and True slice as 0 and 1.
        ids = self.tokenize(separator.join(texts))[self.adds_bos :]
        marks = [n for n, token in enumerate(ids) if token == self._control_tokens[separator]]
        if len(marks) != len(texts) - 1:
            raise InputError(
                f"{self.file.path}: tokenizer: expected {separator!r} to be one token,"
                " found something else"
            )
        starts = [0, *(n + 1 for n in marks)]
        return tuple(end - start for start, end in zip(starts, [*marks, len(ids)], strict=True))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text: control tokens parsed, BOS added if the model wants it.

        Raises:
            ToolError: llama-tokenize fails, or prints no list of tokens.
        """
        with tempfile.TemporaryDirectory(prefix="quant-tokens-") as name:
            folder = Path(name)
            # As a file: an argument has a maximum length. Without escapes: a backslash and an n
            # in a text are two characters.
            files.write_text(folder / "text", text)
            # -lv 1 lets only errors through: the loader would print its messages into the same log.
            arguments = ("-f", "text", "--ids", "--no-escape", "-lv", "1")
            self.tools.run(
                "llama-tokenize",
                ["-m", self.file.path.resolve(), *arguments],
                cwd=folder,
                log=folder / "log",
            )
            lines = (folder / "log").read_text(errors="replace").splitlines()
        # The ids are printed last, as one JSON array; warnings of the model may come before.
        printed = next((line for line in reversed(lines) if line.startswith("[")), None)
        if printed is None:
            raise ToolError(f"llama-tokenize: expected a list of tokens, found {lines[-1:]}")
        ids: list[int] = json.loads(printed)
        return ids

    @cached_property
    def _control_tokens(self) -> dict[str, int]:
        """The text and id of every control token."""
        types = self.file.metadata.get("tokenizer.ggml.token_type", [])
        tokens = self.file.metadata.get("tokenizer.ggml.tokens", [])
        return {
            token: n
            for n, (token, token_type) in enumerate(zip(tokens, types, strict=True))
            if token_type == CONTROL and token
        }

    def _choose_separator(self, texts: Sequence[str]) -> str:
        for token in self._control_tokens:
            if not any(token in text for text in texts):
                return token
        raise InputError(
            f"{self.file.path}: tokenizer: expected a control token that the texts do not use,"
            " found none"
        )
