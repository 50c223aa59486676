"""The older `.dat` form of importance matrices, which llama-imatrix wrote before GGUF.

Layout (tools/imatrix/imatrix.cpp, ``save_imatrix_legacy``; all numbers little-endian)::

    int32 entries
    entries x { int32 length, name, int32 chunks, int32 values, values x float32 }
    int32 chunks, int32 length, name of the text      # not always written

A value is the mean of a column's squared inputs, times the number of chunks. One count stands for
the whole tensor, so the form cannot tell which experts were reached.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class DatMatrix:
    """The contents of a `.dat` file."""

    entries: Mapping[str, tuple[int, "NDArray[np.float32]"]]
    """Chunks and values by tensor."""
    chunks: int
    dataset: str
    """Name of the text. Empty if the file does not have it."""


def read_dat(path: Path) -> DatMatrix:
    """Read a `.dat` file. Raise InputError if it is cut short or is no such file."""
    reader = _DatReader(path)
    entries = {}
    for _ in range(reader.number("number of entries", 1)):
        name = reader.text("name of an entry")
        chunks = reader.number(f"{name}: chunks")
        size = reader.number(f"{name}: number of values", 1)
        entries[name] = (chunks, reader.floats(size, name))
    if reader.is_at_end:
        return DatMatrix(entries, 0, "")
    chunks, dataset = reader.number("chunks"), reader.text("name of the text")
    reader.expect_end()
    return DatMatrix(entries, chunks, dataset)


class _DatReader:
    """Reads a file from begin to end.

    Each length is compared with what is left before anything is read or allocated: a length in a
    foreign file is any number.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.position = path, path.read_bytes(), 0

    @property
    def is_at_end(self) -> bool:
        return self.position == len(self.data)

    def read(self, size: int, what: str) -> bytes:
        left = len(self.data) - self.position
        if not 0 <= size <= left:
            raise InputError(
                f"{self.path}: {what}: expected {size} bytes at byte {self.position}, found {left};"
                " it is no importance matrix, neither GGUF nor .dat, or it was cut short"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, what: str, least: int = 0) -> int:
        value: int = struct.unpack("<i", self.read(4, what))[0]
        if value < least:
            raise InputError(
                f"{self.path}: {what}: expected at least {least}, found {value}; it is no"
                " importance matrix"
            )
        return value

    def text(self, what: str) -> str:
        # A damaged name is no reason to stop here: it is reported as a tensor that the model lacks.
        return self.read(self.number(what), what).decode(errors="replace")

    def floats(self, count: int, what: str) -> "NDArray[np.float32]":
        import numpy as np

        return np.frombuffer(self.read(4 * count, what), "<f4")

    def expect_end(self) -> None:
        if not self.is_at_end:
            raise InputError(
                f"{self.path}: expected its end at byte {self.position}, found"
                f" {len(self.data) - self.position} bytes more"
            )
