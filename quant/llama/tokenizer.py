"""Count tokens as llama.cpp does: with its own tokenizer, and the vocabulary that is in a GGUF file."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from quant.core import files
from quant.core.format import hash_texts, to_canonical_json
from quant.errors import InputError, ToolError
from quant.llama.gguf import Header, list_shards, read_header
from quant.llama.toolchain import Toolchain

CONTROL = 3
"""A token that no text is made of (LLAMA_TOKEN_TYPE_CONTROL)."""


class TextCounter(Protocol):
    """Whatever can say how long texts are."""

    @property
    def unit(self) -> str:
        """What it counts."""

    def counts(self, texts: Sequence[str]) -> tuple[int, ...]:
        """The length of each text."""


@dataclass(frozen=True)
class CharacterCounter:
    """Counts letters, where no model is there to be asked."""

    unit: ClassVar[str] = "characters"

    def counts(self, texts: Sequence[str]) -> tuple[int, ...]:
        """The letters of each text."""
        return tuple(map(len, texts))


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary of one GGUF file."""

    gguf: Path
    tools: Toolchain
    unit: ClassVar[str] = "tokens"

    @cached_property
    def header(self) -> Header:
        """Of the file, or of the first of its shards."""
        return read_header(list_shards(self.gguf)[0])

    @cached_property
    def digest(self) -> str:
        """Names everything that decides how a text is cut into tokens."""
        told = {
            k: v
            for k, v in self.header.metadata.items()
            if k.startswith("tokenizer.") and "template" not in k
        }
        return hash_texts([to_canonical_json(told), str(self.tools.version)])

    @property
    def begins(self) -> bool:
        """Whether the model wants a token of its own at the beginning of what it reads."""
        return bool(self.header.metadata.get("tokenizer.ggml.add_bos_token", False))

    def count(self, text: str) -> int:
        """Tokens of a text, special tokens taken for what they are, with what the model wants at its beginning."""
        return len(self.ids(text))

    def counts(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Tokens of each text by itself, without what the model wants at a beginning; one call for all of them."""
        if not texts:
            return ()
        mark = self._mark(texts)
        ids = self.ids(mark.join(texts))[self.begins :]
        ends = [n for n, token in enumerate(ids) if token == self._control[mark]] + [len(ids)]
        if len(ends) != len(texts):
            raise InputError(
                f"{self.gguf}: tokenizer: expected {mark!r} to be one token, found something else"
            )
        return tuple(
            end - begin for begin, end in zip([0, *(n + 1 for n in ends[:-1])], ends, strict=True)
        )

    def ids(self, text: str) -> list[int]:
        """The tokens of a text. Raises ToolError."""
        with tempfile.TemporaryDirectory(prefix="quant-tokens-") as name:
            folder = Path(name)
            files.write_text(folder / "text", text)
            self.tools.run(
                "llama-tokenize",
                ["-m", self.gguf.resolve(), "-f", "text", "--ids", "--no-escape", "-lv", "1"],
                cwd=folder,
                log=folder / "log",
            )
            lines = (folder / "log").read_text(errors="replace").splitlines()
        told = next((line for line in reversed(lines) if line.startswith("[")), None)
        if told is None:
            raise ToolError(f"llama-tokenize: expected a list of tokens, found {lines[-1:]}")
        found: list[int] = json.loads(told)
        return found

    @cached_property
    def _control(self) -> dict[str, int]:
        metadata = self.header.metadata
        kinds = metadata.get("tokenizer.ggml.token_type", [])
        words = metadata.get("tokenizer.ggml.tokens", [])
        return {
            word: n
            for n, (word, kind) in enumerate(zip(words, kinds, strict=True))
            if kind == CONTROL and word
        }

    def _mark(self, texts: Sequence[str]) -> str:
        """A control token that is in none of the texts."""
        for word in self._control:
            if not any(word in text for text in texts):
                return word
        raise InputError(
            f"{self.gguf}: tokenizer: expected a control token that the texts do not use, found none"
        )
