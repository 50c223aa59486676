"""What a run reads: rows of the base, and the importance of their columns.

Both files are read with ``pread``, a chunk at a time. So memory does not grow with their size, and
threads share one file descriptor. A mapping would be as fast, but a file that becomes shorter under
it ends the process with SIGBUS, where ``pread`` returns an error that names the tensor.
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
from quant.core.errors import InputError
from quant.llama.ggml import Bytes, Library, Rows
from quant.llama.gguf import Header, TensorSpec, read_header
from quant.quantize.engine.chunks import Chunk, split_into_chunks

READ_BYTES: Final = 4 * 2**20


class InputFile:
    """A file that is read during a run and must not change meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open the file, and remember its length, times and inode."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.state = self._state()

    def read(self, offset: int, size: int, subject: str) -> Bytes:
        """Return exactly ``size`` bytes. Raise InputError if the file ends before.

        ``subject`` says in the error what is read.
        """
        buffer = np.empty(size, np.uint8)
        view, done = buffer.data, 0
        while done < size:
            n = os.preadv(self.fd, [view[done:]], offset + done)
            if not n:
                raise InputError(
                    f"{self.path}: {subject}: expected {size} bytes at byte {offset}, "
                    f"found {done}; it was cut short"
                )
            done += n
        return buffer

    def prefetch(self, offset: int, size: int) -> None:
        """Ask the kernel to read bytes in the background that will be needed soon."""
        os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise InputError if the file was written to or replaced since it was opened."""
        now = self._state()
        if now != self.state:
            raise InputError(
                f"{self.path}: changed while it was read; run again once nothing writes to it"
            )

    def _state(self) -> tuple[int, ...]:
        # The name may by now belong to another file, which fstat of the open one cannot show.
        opened, named = os.fstat(self.fd), self.path.stat()
        return (opened.st_size, opened.st_mtime_ns, opened.st_ctime_ns, named.st_dev, named.st_ino)


@dataclass(frozen=True)
class WeightSource:
    """The base: its rows, by tensor and chunk."""

    header: Header
    file: InputFile

    @classmethod
    def open(cls, path: Path) -> "WeightSource":
        """Open a base, and read and check its header."""
        file = InputFile(path)
        return cls(read_header(path), file)

    def read_rows(self, tensor: TensorSpec, chunk: Chunk) -> Bytes:
        """Return the rows of a chunk as they are stored."""
        return self.file.read(*self._locate(tensor, chunk), f"tensor {tensor.name}")

    def prefetch(self, tensor: TensorSpec, chunk: Chunk) -> None:
        """Ask the kernel to read the rows of a chunk in the background."""
        self.file.prefetch(*self._locate(tensor, chunk))

    def _locate(self, tensor: TensorSpec, chunk: Chunk) -> tuple[int, int]:
        """Return the offset and the size of a chunk in bytes."""
        row = tensor.type.bytes(tensor.shape[0])
        return self.header.data_start + tensor.offset + chunk.first_row * row, chunk.rows * row

    def describe_non_finite(self, tensor: TensorSpec, library: Library) -> str:
        """Return an error text: how many weights are NaN or infinite, and which is the first."""
        count, first, before = 0, -1, 0
        for chunk in split_into_chunks(tensor):
            rows = library.to_float(tensor.type, self.read_rows(tensor, chunk), tensor.shape[0])
            bad = np.flatnonzero(~np.isfinite(rows))
            if bad.size and first < 0:
                first = before + int(bad[0])
            count, before = count + bad.size, before + rows.size
        return (
            f"{self.file.path}: tensor {tensor.name}: {count} of {before} weights are NaN or "
            f"infinite, the first at {first}"
        )


@dataclass(frozen=True)
class ColumnImportance:
    """An open imatrix file: the importance of every column, read when it is asked for.

    :mod:`quant.calibration.imatrix_file` knows the format and checks it. Only the reading differs:
    a whole imatrix of a large model would not fit into the engine's memory limit.
    """

    header: Header
    file: InputFile

    @classmethod
    def open(cls, path: Path) -> "ColumnImportance":
        """Open an imatrix and read its header."""
        file = InputFile(path)
        return cls(read_header(path), file)

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
        """Return the weight of each column of an expert, of shape (row,), or None without data.

        That is Σ x² / n, the mean square of the column's input, and 1 for an expert that no token
        reached, as llama-quantize loads it (load_imatrix in tools/quantize/quantize.cpp).
        """
        entry = self.entries.get(tensor.name)
        if entry is None or not _fits(entry, tensor):
            return None
        row = tensor.shape[0]
        sums = self._read(entry.sums, expert * row, row)
        per_count = entry.sums.elements // entry.counts.elements
        # One count may stand for the whole expert, or for all experts.
        which = np.arange(expert * row, (expert + 1) * row) // per_count
        # Rounded, because the file has them as floats (std::lround in imatrix-loader.cpp).
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


def all_finite(rows: Rows) -> bool:
    """Return whether no weight is NaN or infinite."""
    return bool(np.isfinite(rows).all())


def _columns(tensor: TensorSpec) -> int:
    return tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)


def _fits(entry: EntryTensors, tensor: TensorSpec) -> bool:
    return entry.sums.elements == _columns(tensor)
