"""A variant's files while they are written: at full length beside their final names, filled in any order, the heads last.

Until its head is there a file is no GGUF file, so a half-written one cannot be taken for a whole one; and final names
come after everything is on the disk and was read back.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.format import to_pretty_json
from quant.errors import CheckError
from quant.llama.ggml import Bytes
from quant.llama.gguf import read_header
from quant.llama.tensors import stored_shape
from quant.quantize.engine import chunks, journal
from quant.quantize.engine.chunks import Chunk
from quant.quantize.engine.journal import BlockSums, Journal
from quant.quantize.engine.layout import FileLayout, PlacedTensor

RECORD = ".json"
"""Ends the name of what is said of a finished variant."""
READ_BYTES = 2**18
"""Of a file whose digest is made, at a time: so much stays in the cache of a core."""


@dataclass(frozen=True)
class WrittenFile:
    """What one tensor of a finished file is."""

    type: str
    sha256: str
    error: float
    """What was lost, relative: the weighted squares of the differences over those of the weights, on some rows."""


class Output:
    """One variant in work: a file, or its shards."""

    def __init__(self, layout: FileLayout, path: Path, bound: str) -> None:
        """Go on with what an earlier run left, where its journal is bound to the same; else begin anew.

        ``path`` is that of the whole file; shards are called after it.
        """
        self.layout, self.path = layout, path
        self.paths = [
            path.with_name(name) for name in layout.names(path.name.removesuffix(".gguf"))
        ]
        self.partials = [p.with_name(p.name + files.PARTIAL) for p in self.paths]
        digest = hashlib.sha256(f"{bound} {layout.digest} {chunks.CHUNK_WEIGHTS}".encode()).digest()
        self.done: dict[tuple[int, int], BlockSums] = self._left(digest)
        if not self.done:
            for old in (journal.journal_path(path), record_path(path), *self.partials):
                files.remove(old)
        self.fds = [os.open(p, os.O_RDWR | os.O_CREAT, 0o644) for p in self.partials]
        for fd, size in zip(self.fds, layout.sizes, strict=True):
            os.ftruncate(fd, size)
            os.fdatasync(fd)  # what was done before is marked as safe below
        self.journal: Journal = journal.start_journal(
            journal.journal_path(path), digest, journal.read_boot_id(), self.done
        )

    def _left(self, digest: bytes) -> dict[tuple[int, int], BlockSums]:
        pairs = zip(self.partials, self.layout.sizes, strict=True)
        if not all(p.is_file() and p.stat().st_size == size for p, size in pairs):
            return {}
        return journal.read_journal(journal.journal_path(self.path), digest, journal.read_boot_id())

    def write(self, tensor: int, chunk: Chunk, data: Bytes, sums: BlockSums) -> None:
        """Put a chunk's bytes where they belong, and say so in the journal."""
        placed = self.layout.tensors[tensor]
        self.put(placed.part, placed.offset + chunk.first_row * placed.row_bytes, data.data)
        self.note(tensor, chunk.no, sums)

    def note(self, tensor: int, chunk: int, sums: BlockSums) -> None:
        """The chunk's bytes are in the file."""
        self.journal.add(tensor, chunk, sums)
        self.done[tensor, chunk] = sums

    def put(self, part: int, offset: int, view: memoryview) -> None:
        """Write all of it. Raises OSError that names the file when there is no room."""
        try:
            while view:
                n = os.pwrite(self.fds[part], view, offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            e.filename = str(self.partials[part])
            raise

    def sync(self) -> None:
        """Flush what was written, and mark it in the journal.

        After a flush that failed nobody knows what is on the disk, and the kernel does not tell twice: then the journal
        is taken away, and the next run begins this variant anew.
        """
        records = self.journal.records
        if records == self.journal.marked:
            return
        try:
            for fd in self.fds:
                os.fdatasync(fd)
        except OSError:
            files.remove(journal.journal_path(self.path))
            raise
        self.journal.mark(records)

    def digest(self, tensor: int) -> str:
        """The sha256 of a tensor, as it is read back from its file."""
        placed = self.layout.tensors[tensor]
        return read_digest(self.fds[placed.part], placed.offset, placed.bytes)

    def finish(self, made: Mapping[str, WrittenFile], facts: Mapping[str, Any]) -> None:
        """The heads, everything on the disk, read back, and then the final names. Raises CheckFailed for a wrong head."""
        for part, head in enumerate(self.layout.heads):
            self.put(part, 0, memoryview(head))
            os.fsync(self.fds[part])
        if wrong := [line for part in range(len(self.paths)) for line in self._differences(part)]:
            raise CheckError(*wrong)
        named = {**facts, "files": [p.name for p in self.paths]}
        files.write_text(
            record_path(self.path),
            to_pretty_json({**named, "tensors": {name: asdict(m) for name, m in made.items()}}),
        )
        for partial, path in zip(self.partials, self.paths, strict=True):
            files.replace_atomically(partial, path)
        files.remove(journal.journal_path(self.path))

    def close(self) -> None:
        """Nothing more is written."""
        for fd in self.fds:
            os.close(fd)
        self.journal.close()

    def _differences(self, part: int) -> Iterator[str]:
        path, partial = self.paths[part], self.partials[part]
        header = read_header(partial)
        found = [
            (t.name, t.shape, t.type.name, header.data_start + t.offset) for t in header.tensors
        ]
        expected = [_told(t) for t in self.layout.tensors if t.part == part]
        pairs = zip(expected, found, strict=False)
        yield from (f"{path}: read back: expected {e}, found {f}" for e, f in pairs if e != f)
        if len(found) != len(expected):
            yield f"{path}: read back: expected {len(expected)} tensors, found {len(found)}"
        if (size := partial.stat().st_size) != self.layout.sizes[part]:
            yield f"{path}: expected {self.layout.sizes[part]} bytes, found {size}"


def read_finished(path: Path, identity: str) -> Mapping[str, Any] | None:
    """The record of a variant whose files stand, or can stand: its run was ended while they got their final names.

    The record is written when all of them are complete and on the disk.
    """
    try:
        record: Mapping[str, Any] = json.loads(record_path(path).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if record["identity"] != identity:
        return None
    for final in (path.with_name(name) for name in record["files"]):
        partial = final.with_name(final.name + files.PARTIAL)
        if not final.exists() and not partial.exists():
            return None
        if not final.exists():
            files.replace_atomically(partial, final)
    files.remove(journal.journal_path(path))
    return record


def record_path(path: Path) -> Path:
    """Where the record of a finished variant is."""
    return path.with_name(path.name + RECORD)


def read_digest(fd: int, offset: int, size: int) -> str:
    """The sha256 of some bytes of an open file."""
    sha, view = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    while size and (n := os.preadv(fd, [view[: min(size, READ_BYTES)]], offset)):
        sha.update(view[:n])
        offset, size = offset + n, size - n
    return sha.hexdigest()


def _told(t: PlacedTensor) -> tuple[str, tuple[int, ...], str, int]:
    return t.name, stored_shape(t.source), t.type.name, t.offset
