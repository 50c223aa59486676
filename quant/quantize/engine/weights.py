"""What a run reads: the rows of the BF16 file, and the importance of their columns.

Both files are read with ``pread`` at known places, a chunk at a time, so their size does not count in memory.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quant.calibration.imatrix_file import (
    EntryTensors,
    find_count_problem,
    find_format_problems,
    find_model_problems,
    find_sum_problem,
    list_entries,
)
from quant.errors import InputError
from quant.llama.ggml import Bytes, Library, Rows
from quant.llama.gguf import Header, TensorSpec, read_header
from quant.quantize.engine.chunks import Chunk, split_into_chunks

READ_BYTES: Final = 4 * 2**20


class WatchedFile:
    """A file that is read and may not change while it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.state = self._state()

    def read(self, offset: int, size: int, what: str) -> Bytes:
        """Exactly so many bytes. Raises InputError where the file ends before."""
        buffer = np.empty(size, np.uint8)
        view, done = buffer.data, 0
        while done < size:
            n = os.preadv(self.fd, [view[done:]], offset + done)
            if not n:
                raise InputError(
                    f"{self.path}: {what}: expected {size} bytes at byte {offset}, found {done}; it was cut short"
                )
            done += n
        return buffer

    def expect(self, offset: int, size: int) -> None:
        """Ask for bytes that will be read soon; nobody waits for them here."""
        os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise InputError when someone wrote to it since it was opened, or put another in its place."""
        now = self._state()
        if now != self.state:
            raise InputError(f"{self.path}: changed while it was read; run again when it rests")

    def _state(self) -> tuple[int, ...]:
        opened, named = os.fstat(self.fd), self.path.stat()
        return (opened.st_size, opened.st_mtime_ns, opened.st_ctime_ns, named.st_dev, named.st_ino)


@dataclass(frozen=True)
class WeightSource:
    """The BF16 file: rows by tensor."""

    header: Header
    file: WatchedFile

    @staticmethod
    def open(path: Path) -> "WeightSource":
        """Its head is read and checked."""
        file = WatchedFile(path)
        return WeightSource(read_header(path), file)

    def raw(self, tensor: TensorSpec, chunk: Chunk) -> Bytes:
        """The bytes of some rows, as they are stored."""
        return self.file.read(*self._place(tensor, chunk), f"tensor {tensor.name}")

    def expect(self, tensor: TensorSpec, chunk: Chunk) -> None:
        """These rows will be read soon."""
        self.file.expect(*self._place(tensor, chunk))

    def _place(self, tensor: TensorSpec, chunk: Chunk) -> tuple[int, int]:
        """From which byte, and how many."""
        row = tensor.type.bytes(tensor.shape[0])
        return self.header.data_start + tensor.offset + chunk.first_row * row, chunk.rows * row

    def non_finite(self, tensor: TensorSpec, library: Library) -> str:
        """How many weights of a tensor are no numbers, and where the first is."""
        count, first, before = 0, -1, 0
        for chunk in split_into_chunks(tensor):
            rows = library.to_float(tensor.type, self.raw(tensor, chunk), tensor.shape[0])
            bad = np.flatnonzero(~np.isfinite(rows))
            if bad.size and first < 0:
                first = before + int(bad[0])
            count, before = count + bad.size, before + rows.size
        return f"{self.file.path}: tensor {tensor.name}: {count} of {before} weights are NaN or infinite, the first at {first}"


@dataclass(frozen=True)
class ColumnImportance:
    """An open imatrix file: the importance of every column, read when it is asked for.

    :mod:`quant.calibration.imatrix_file` knows the format and checks it. Only the reading differs:
    a whole imatrix of a large model would not fit into the engine's memory limit.
    """

    header: Header
    file: WatchedFile

    @staticmethod
    def open(path: Path) -> "ColumnImportance":
        """Open an imatrix and read its header."""
        file = WatchedFile(path)
        return ColumnImportance(read_header(path), file)

    @cached_property
    def entries(self) -> Mapping[str, EntryTensors]:
        """Where the data of each weight matrix is, by its name."""
        return list_entries(self.header)

    def problems(self, tensors: Collection[TensorSpec]) -> Iterator[str]:
        """Yield everything in which it is not an imatrix of a model with these tensors."""
        where = f"{self.file.path}: imatrix"
        if format_problems := [*find_format_problems(self.header)]:
            yield from format_problems
            return
        sizes = {name: entry.sizes for name, entry in self.entries.items()}
        yield from find_model_problems(sizes, tensors, where)
        for name, entry in self.entries.items():
            if problem := self._find_value_problem(entry):
                yield f"{where}: {name}: {problem}"

    def columns(self, tensor: TensorSpec, expert: int) -> NDArray[np.float32] | None:
        """What each column of an expert's rows weighs; nothing where there is no data.

        As llama-quantize has it: the mean of the squares, and 1 for experts that saw no token.
        """
        entry = self.entries.get(tensor.name)
        if entry is None or not _fits(entry, tensor):
            return None
        row = tensor.shape[0]
        sums = self._read(entry.sums, expert * row, row)
        per_count = entry.sums.elements // entry.counts.elements
        which = np.arange(expert * row, (expert + 1) * row) // per_count
        counts = np.rint(self._read(entry.counts, int(which[0]), int(which[-1] - which[0]) + 1))[
            which - which[0]
        ]
        return np.where(counts > 0, sums / np.where(counts > 0, counts, 1), 1).astype(np.float32)

    def _find_value_problem(self, entry: EntryTensors) -> str | None:
        sums = (find_sum_problem(values, first) for first, values in self._blocks(entry.sums))
        counts = (find_count_problem(np.rint(v)) for _, v in self._blocks(entry.counts))
        return next(filter(None, chain(sums, counts)), None)

    def _blocks(self, tensor: TensorSpec) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield a tensor's values in parts of bounded size, each with the position of its first."""
        step = READ_BYTES // 4
        for first in range(0, tensor.elements, step):
            yield first, self._read(tensor, first, min(step, tensor.elements - first))

    def _read(self, tensor: TensorSpec, first: int, count: int) -> NDArray[np.float32]:
        start = self.header.data_start + tensor.offset + 4 * first
        return self.file.read(start, 4 * count, tensor.name).view(np.float32)


def finite(rows: Rows) -> bool:
    """Whether every weight is a number."""
    return bool(np.isfinite(rows).all())


def _columns(tensor: TensorSpec) -> int:
    return tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)


def _fits(entry: EntryTensors, tensor: TensorSpec) -> bool:
    return entry.sums.elements == _columns(tensor)
