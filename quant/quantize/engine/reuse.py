"""Tensors that need no quantizing: a finished file of the same base and imatrix has them."""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.core.errors import InputError
from quant.llama.gguf import Header, TensorSpec, read_header
from quant.quantize.engine.chunks import split_into_chunks
from quant.quantize.engine.journal import ErrorSums
from quant.quantize.engine.layout import TensorPlacement
from quant.quantize.engine.output import TensorResult, VariantOutput, hash_range

# Below what Linux copies in one call at most: 2 GiB - 4 KiB (MAX_RW_COUNT).
COPY_BYTES = 2**30
BUFFER_BYTES = 4 * 2**20
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors with which copy_file_range says that it cannot copy between these two file systems."""


@dataclass(frozen=True)
class ReusableFile:
    """A file that an earlier run wrote from the same base, imatrix and tools."""

    path: Path
    tensors: Mapping[str, TensorResult]


class ReusableTensors:
    """The tensors of reusable files, by name and type."""

    def __init__(self, reusable: Sequence[ReusableFile]) -> None:
        """Read the headers. A file that is gone or damaged is skipped: it was only a shortcut."""
        self.headers: list[tuple[Header, Mapping[str, TensorResult]]] = []
        for file in reusable:
            try:
                self.headers.append((read_header(file.path), file.tensors))
            except InputError:
                continue

    def find_copies(
        self, tensor: TensorSpec, type_name: str
    ) -> Iterator[tuple[Path, int, TensorResult]]:
        """Yield each file that has the tensor in that type, the byte offset, and its record."""
        for header, records in self.headers:
            record, spec = records.get(tensor.name), header.by_name.get(tensor.name)
            if (
                record
                and spec
                and record.type == spec.type.name == type_name
                and spec.elements == tensor.elements
            ):
                yield header.path, header.data_start + spec.offset, record

    def copy_tensor(self, tensor: int, outputs: Sequence[VariantOutput]) -> None:
        """Copy a tensor into every output that has none of it and needs it in a type found here."""
        for output in outputs:
            placement = output.layout.tensors[tensor]
            chunks = split_into_chunks(placement.source)
            # Chunks of an interrupted run have measured sums, which equal ones would spoil.
            if any((tensor, c.index) in output.done for c in chunks):
                continue
            for path, offset, record in self.find_copies(placement.source, placement.type.name):
                if _copy_if_intact(path, offset, output, tensor, record.sha256):
                    # The chunks' own sums are unknown; equal ones give the tensor's error again.
                    for c in chunks:
                        output.record_chunk(tensor, c.index, ErrorSums(record.error, 1.0))
                    break


def _copy_if_intact(
    path: Path, offset: int, output: VariantOutput, tensor: int, sha256: str
) -> bool:
    """Copy a tensor if its bytes still have that digest. Return whether they do."""
    placement = output.layout.tensors[tensor]
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if hash_range(fd, offset, placement.bytes) != sha256:
            return False
        _copy(fd, offset, output, placement)
    finally:
        os.close(fd)
    return True


def _copy(fd: int, offset: int, output: VariantOutput, placement: TensorPlacement) -> None:
    """Copy with copy_file_range, which shares blocks where the file system can; else by reading."""
    to, size = placement.offset, placement.bytes
    while size:
        try:
            n = os.copy_file_range(
                fd, output.fds[placement.part], min(size, COPY_BYTES), offset, to
            )
        except OSError as e:
            if e.errno not in _NO_KERNEL_COPY:
                e.filename = str(output.partials[placement.part])
                raise
            n = 0
        # 0 does not prove the end: on some virtual file systems the call copies nothing and reports
        # success (copy_file_range(2), BUGS). The read below decides.
        if not n:
            data = os.pread(fd, min(size, BUFFER_BYTES), offset)
            if not data:
                raise InputError(
                    f"{output.path}: a finished file became shorter while it was copied"
                )
            output.write_bytes(placement.part, to, memoryview(data))
            n = len(data)
        offset, to, size = offset + n, to + n, size - n
