"""A variant's files while they are written, from full length to final name.

Files have a temporary name beside the final one and their full length from the start. Chunks are
written in any order, the headers last. Until its header is there a file is not a GGUF, so a
half-written one cannot be mistaken for a whole one. Final names are given when everything is on the
disk and was read back.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.errors import CheckError
from quant.core.format import to_pretty_json
from quant.llama.ggml import Bytes
from quant.llama.gguf import read_header
from quant.llama.tensors import stored_shape
from quant.quantize.engine import chunks, journal
from quant.quantize.engine.chunks import Chunk
from quant.quantize.engine.journal import ErrorSums, Journal
from quant.quantize.engine.layout import FileLayout, TensorPlacement

RECORD = ".json"
"""Suffix of a finished variant's record."""
READ_BYTES = 2**18
"""Bytes read at a time for a digest: so many stay in the cache of a core."""


@dataclass(frozen=True)
class TensorResult:
    """One tensor of a finished variant, as its record NAME.gguf.json describes it."""

    type: str
    sha256: str
    error: float
    """Relative weighted mean squared error, measured on some rows."""


class VariantOutput:
    """The files of one variant while they are written: one, or its shards."""

    def __init__(self, layout: FileLayout, path: Path, identity: str) -> None:
        """Continue what an interrupted run left for the same work, or begin anew.

        Args:
            layout: Where every byte belongs.
            path: The path of the whole file; shards are named after it.
            identity: What the bytes depend on besides the layout: base, imatrix and Hessians.
        """
        self.layout, self.path = layout, path
        self.paths = [
            path.with_name(name) for name in layout.file_names(path.name.removesuffix(".gguf"))
        ]
        self.partials = [p.with_name(p.name + files.PARTIAL) for p in self.paths]
        # The chunk size is part of it: a journal counts chunks.
        bound_to = hashlib.sha256(
            f"{identity} {layout.digest} {chunks.CHUNK_WEIGHTS}".encode()
        ).digest()
        self.done: dict[tuple[int, int], ErrorSums] = self._read_journal(bound_to)
        if not self.done:
            for old in (journal.journal_path(path), record_path(path), *self.partials):
                files.remove(old)
        # Without O_TRUNC: the chunks that the journal names are in these files.
        self.fds = [os.open(p, os.O_RDWR | os.O_CREAT, 0o644) for p in self.partials]
        for fd, size in zip(self.fds, layout.sizes, strict=True):
            # Sparse: allocating all blocks now made no difference (tests/benchmarks/README.md).
            os.ftruncate(fd, size)
            os.fdatasync(fd)  # The new journal marks the older chunks as being on the disk.
        self.journal: Journal = journal.start_journal(
            journal.journal_path(path), bound_to, journal.read_boot_id(), self.done
        )

    def write_chunk(self, tensor: int, chunk: Chunk, data: Bytes, sums: ErrorSums) -> None:
        """Write a chunk of a tensor, and record it in the journal."""
        placement = self.layout.tensors[tensor]
        offset = placement.offset + chunk.first_row * placement.row_bytes
        self.write_bytes(placement.part, offset, data.data)
        self.record_chunk(tensor, chunk.index, sums)

    def record_chunk(self, tensor: int, chunk: int, sums: ErrorSums) -> None:
        """Record in the journal that the chunk's bytes are in the file."""
        self.journal.add(tensor, chunk, sums)
        self.done[tensor, chunk] = sums

    def write_bytes(self, part: int, offset: int, view: memoryview) -> None:
        """Write all bytes to one of the files.

        Raises:
            OSError: The disk is full; its ``filename`` is that of the file.
        """
        try:
            while view:
                n = os.pwrite(self.fds[part], view, offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            e.filename = str(self.partials[part])
            raise

    def sync(self) -> None:
        """Flush the data to the disk, and mark it in the journal.

        After a failed flush nobody knows what is on the disk, and the kernel reports the failure
        only once (fsyncgate). The journal is then removed, so the next run begins this variant
        anew.
        """
        # Read before the flush: a record that is added meanwhile may be of data that it misses.
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

    def hash_tensor(self, tensor: int) -> str:
        """Return the sha256 of a tensor, read back from its file."""
        placement = self.layout.tensors[tensor]
        return hash_range(self.fds[placement.part], placement.offset, placement.bytes)

    def finish(self, tensors: Mapping[str, TensorResult], facts: Mapping[str, Any]) -> None:
        """Write the headers, flush, read back, write the record, and give the final names.

        Args:
            tensors: A record of every tensor.
            facts: What the variant's record says besides its files and tensors.

        Raises:
            CheckError: A header that was read back is not the planned one.
        """
        # The headers come last: until they are there, no reader takes the file for a GGUF.
        for part, head in enumerate(self.layout.heads):
            self.write_bytes(part, 0, memoryview(head))
            os.fsync(self.fds[part])
        if wrong := [line for part in range(len(self.paths)) for line in self._differences(part)]:
            raise CheckError(*wrong)
        record = {
            **facts,
            "files": [p.name for p in self.paths],
            "tensors": {name: asdict(t) for name, t in tensors.items()},
        }
        # The record before the names: recover_record completes the renaming after a kill here.
        files.write_text(record_path(self.path), to_pretty_json(record))
        for partial, path in zip(self.partials, self.paths, strict=True):
            files.replace_atomically(partial, path)
        files.remove(journal.journal_path(self.path))

    def close(self) -> None:
        """Close the files."""
        for fd in self.fds:
            os.close(fd)
        self.journal.close()

    def _read_journal(self, bound_to: bytes) -> dict[tuple[int, int], ErrorSums]:
        pairs = zip(self.partials, self.layout.sizes, strict=True)
        if not all(p.is_file() and p.stat().st_size == size for p, size in pairs):
            return {}
        path = journal.journal_path(self.path)
        return journal.read_journal(path, bound_to, journal.read_boot_id())

    def _differences(self, part: int) -> Iterator[str]:
        path, partial = self.paths[part], self.partials[part]
        header = read_header(partial)
        actual = [
            (t.name, t.shape, t.type.name, header.data_start + t.offset) for t in header.tensors
        ]
        expected = [_describe(t) for t in self.layout.tensors if t.part == part]
        pairs = zip(expected, actual, strict=False)
        yield from (f"{path}: read back: expected {e}, found {a}" for e, a in pairs if e != a)
        if len(actual) != len(expected):
            yield f"{path}: read back: expected {len(expected)} tensors, found {len(actual)}"
        if (size := partial.stat().st_size) != self.layout.sizes[part]:
            yield f"{path}: expected {self.layout.sizes[part]} bytes, found {size}"


def recover_record(path: Path, identity: str) -> Mapping[str, Any] | None:
    """Return the record of a variant that an earlier run of the same work finished, or None.

    The record is written when all files are complete and on the disk. If the run ended while the
    files got their final names, the rest of them is renamed here.
    """
    try:
        record: Mapping[str, Any] = json.loads(record_path(path).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if record["identity"] != identity:
        return None
    # The loop in finish gives names in this order; any of its steps may be the last one done.
    for final in (path.with_name(name) for name in record["files"]):
        partial = final.with_name(final.name + files.PARTIAL)
        if not final.exists() and not partial.exists():
            return None
        if not final.exists():
            files.replace_atomically(partial, final)
    files.remove(journal.journal_path(path))
    return record


def record_path(path: Path) -> Path:
    """Return the path of a variant's record."""
    return path.with_name(path.name + RECORD)


def hash_range(fd: int, offset: int, size: int) -> str:
    """Return the sha256 of a range of an open file."""
    sha, view = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    # preadv into one buffer: threads share the descriptor, and nothing is allocated per read.
    while size and (n := os.preadv(fd, [view[: min(size, READ_BYTES)]], offset)):
        sha.update(view[:n])
        offset, size = offset + n, size - n
    return sha.hexdigest()


def _describe(t: TensorPlacement) -> tuple[str, tuple[int, ...], str, int]:
    return t.name, stored_shape(t.source), t.type.name, t.offset
