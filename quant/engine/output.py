"""A variant's file while it is written: at its full length beside its final name, filled in any order, the head last.

Until the head is there it is no GGUF file, so a half-written one cannot be taken for a whole one; and its final name
comes after everything is on the disk and was read back.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant import files
from quant.engine import chunks, journal
from quant.engine.chunks import Chunk
from quant.engine.journal import Journal, Sums
from quant.engine.layout import Layout, Placed
from quant.errors import CheckFailed
from quant.footprint import stored_shape
from quant.ggml import Bytes
from quant.header import read_header

RECORD = ".json"
"""Ends the name of what is said of a finished file."""
READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Made:
    """What one tensor of a finished file is."""

    type: str
    sha256: str
    error: float
    """What was lost, relative: the weighted squares of the differences over those of the weights, on some rows."""


class Output:
    """One file in work."""

    def __init__(self, layout: Layout, path: Path, bound: str) -> None:
        """Go on with what an earlier run left, where its journal is bound to the same; else begin anew."""
        self.layout, self.path = layout, path
        self.partial = path.with_name(path.name + files.PARTIAL)
        digest = hashlib.sha256(f"{bound} {layout.digest} {chunks.CHUNK_WEIGHTS}".encode()).digest()
        self.done: dict[tuple[int, int], Sums] = self._left(digest)
        if not self.done:
            files.remove(journal.path_of(path))
            files.remove(self.partial)
        self.fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self.fd, layout.bytes)
        os.fdatasync(self.fd)  # what was done before is marked as safe below
        self.journal: Journal = journal.start(journal.path_of(path), digest, journal.boot(), self.done)

    def _left(self, digest: bytes) -> dict[tuple[int, int], Sums]:
        if not self.partial.is_file() or self.partial.stat().st_size != self.layout.bytes:
            return {}
        return journal.read(journal.path_of(self.path), digest, journal.boot())

    def write(self, tensor: int, chunk: Chunk, data: Bytes, sums: Sums) -> None:
        """Put a chunk's bytes where they belong, and say so in the journal."""
        placed = self.layout.tensors[tensor]
        self.put(placed.offset + chunk.first_row * placed.row_bytes, data.data)
        self.note(tensor, chunk.no, sums)

    def note(self, tensor: int, chunk: int, sums: Sums) -> None:
        """The chunk's bytes are in the file."""
        self.journal.add(tensor, chunk, sums)
        self.done[tensor, chunk] = sums

    def put(self, offset: int, view: memoryview) -> None:
        """Write all of it. Raises OSError that names the file when there is no room."""
        try:
            while view:
                n = os.pwrite(self.fd, view, offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            e.filename = str(self.partial)
            raise

    def sync(self) -> None:
        """Flush what was written, and mark it in the journal.

        After a flush that failed nobody knows what is on the disk, and the kernel does not tell twice: then the journal
        is taken away, and the next run begins this file anew.
        """
        records = self.journal.records
        if records == self.journal.marked:
            return
        try:
            os.fdatasync(self.fd)
        except OSError:
            files.remove(journal.path_of(self.path))
            raise
        self.journal.mark(records)

    def digest(self, tensor: int) -> str:
        """The sha256 of a tensor, as it is read back from the file."""
        placed = self.layout.tensors[tensor]
        return digest_at(self.fd, placed.offset, placed.bytes)

    def finish(self, made: Mapping[str, Made], facts: Mapping[str, Any]) -> None:
        """The head, everything on the disk, read back, and then the final name. Raises CheckFailed for a wrong head."""
        self.put(0, memoryview(self.layout.head))
        os.fsync(self.fd)
        if wrong := self._differences():
            raise CheckFailed(*wrong)
        record = {**facts, "tensors": {name: asdict(m) for name, m in made.items()}}
        files.write_text(record_path(self.path), files.pretty(record))
        files.adopt(self.partial, self.path)
        files.remove(journal.path_of(self.path))

    def close(self) -> None:
        """Nothing more is written."""
        os.close(self.fd)
        self.journal.close()

    def _differences(self) -> list[str]:
        header = read_header(self.partial)
        found = [(t.name, t.shape, t.type.name, header.data_start + t.offset) for t in header.tensors]
        expected = [_told(t) for t in self.layout.tensors]
        wrong = [
            f"{self.path}: read back: expected {e}, found {f}" for e, f in zip(expected, found, strict=False) if e != f
        ]
        if len(found) != len(expected):
            wrong.append(f"{self.path}: read back: expected {len(expected)} tensors, found {len(found)}")
        if (size := self.partial.stat().st_size) != self.layout.bytes:
            wrong.append(f"{self.path}: expected {self.layout.bytes} bytes, found {size}")
        return wrong


def record_path(path: Path) -> Path:
    """Where the record of a finished file is."""
    return path.with_name(path.name + RECORD)


def digest_at(fd: int, offset: int, size: int) -> str:
    """The sha256 of some bytes of an open file."""
    sha = hashlib.sha256()
    while size:
        data = os.pread(fd, min(size, READ_BYTES), offset)
        if not data:
            break
        sha.update(data)
        offset, size = offset + len(data), size - len(data)
    return sha.hexdigest()


def _told(t: Placed) -> tuple[str, tuple[int, ...], str, int]:
    return t.name, stored_shape(t.source), t.type.name, t.offset
