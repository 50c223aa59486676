"""A GGUF model on disk: one file, or the shards of a split. Every stage passes it on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.files import Receipt
from quant.core.format import hash_texts
from quant.llama.gguf import Header, TensorSpec, list_shards, read_headers


@dataclass(frozen=True)
class ModelFile:
    """A GGUF model on disk, of one file or several.

    Nothing is read before it is asked for, and the headers are read once: that of a model like
    GLM-4.6, with 151,552 tokens and 318,088 merges, takes two to three seconds. So pass the
    ModelFile on, not its path.
    """

    paths: tuple[Path, ...]
    """The file, or all shards in their order."""
    known_receipts: tuple[Receipt, ...] = ()
    """Length and sha256 of each path, if whoever wrote the files has them."""

    @classmethod
    def open(cls, path: Path) -> "ModelFile":
        """Return the model at ``path``, which is its file or its first shard."""
        return cls(list_shards(path))

    @property
    def path(self) -> Path:
        """The path that llama.cpp is given: the file, or the first shard."""
        return self.paths[0]

    @cached_property
    def headers(self) -> tuple[Header, ...]:
        """The header of each file.

        Raises:
            InputError: A file cannot be read, or a shard is missing or of another split.
        """
        return read_headers(self.path)

    @property
    def header(self) -> Header:
        """The first header, which has the model's metadata. Raises InputError as ``headers``."""
        return self.headers[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """The model's metadata. Raises InputError as ``headers``."""
        return self.header.metadata

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of all files, in file order. Raises InputError as ``headers``."""
        return tuple(t for header in self.headers for t in header.tensors)

    @cached_property
    def receipts(self) -> tuple[Receipt, ...]:
        """Length and sha256 of each path. Reads every byte, unless they are known.

        Raises:
            InputError: As ``headers``.
        """
        if self.known_receipts:
            return self.known_receipts
        _ = self.headers  # names every missing shard before hours of hashing
        return tuple(files.make_receipt(p, p.parent) for p in self.paths)

    @property
    def digest(self) -> str:
        """One sha256 for the model: of its file, or of the list of its shards' sha256."""
        if len(self.receipts) == 1:
            return self.receipts[0].sha256
        return hash_texts([r.sha256 for r in self.receipts])

    @property
    def bytes(self) -> int:
        """Length of all files together. Reads none of them."""
        if self.known_receipts:
            return sum(r.bytes for r in self.known_receipts)
        return sum(p.stat().st_size for p in self.paths)
