"""Tensors that need not be quantised again: a finished file of the same weights and the same imatrix has them."""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.errors import InputError
from quant.llama.gguf import Header, TensorSpec, read_header
from quant.quantize.engine.chunks import split_into_chunks
from quant.quantize.engine.journal import BlockSums
from quant.quantize.engine.layout import PlacedTensor
from quant.quantize.engine.output import Output, WrittenFile, read_digest

COPY_BYTES = 2**30
_ELSEWHERE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""The kernel cannot copy between these two file systems by itself."""


@dataclass(frozen=True)
class FinishedFile:
    """A file that was made before, of the same weights, imatrix and tools."""

    path: Path
    tensors: Mapping[str, WrittenFile]


class ReusableTensors:
    """What finished files have, by tensor and type."""

    def __init__(self, finished: Sequence[FinishedFile]) -> None:
        self.headers: list[tuple[Header, Mapping[str, WrittenFile]]] = []
        for f in finished:
            try:
                self.headers.append((read_header(f.path), f.tensors))
            except InputError:
                continue  # gone or damaged: it is only a shorter way

    def find(self, tensor: TensorSpec, type_name: str) -> Iterator[tuple[Path, int, WrittenFile]]:
        """Files that have the tensor in that type, and at which byte."""
        for header, made in self.headers:
            told, there = made.get(tensor.name), header.by_name.get(tensor.name)
            if (
                told
                and there
                and told.type == there.type.name == type_name
                and there.elements == tensor.elements
            ):
                yield header.path, header.data_start + there.offset, told

    def fill(self, tensor: int, outputs: Sequence[Output]) -> None:
        """Copy a tensor into those of the files that lack it and want the type that a finished file has."""
        for output in outputs:
            placed = output.layout.tensors[tensor]
            pieces = split_into_chunks(placed.source)
            if any((tensor, c.no) in output.done for c in pieces):
                continue
            for path, offset, made in self.find(placed.source, placed.type.name):
                if _copied(path, offset, output, tensor, made.sha256):
                    for c in pieces:
                        output.note(tensor, c.no, BlockSums(made.error, 1.0))
                    break


def _copied(path: Path, offset: int, output: Output, tensor: int, sha256: str) -> bool:
    """Whether the bytes at that place are what was once written there, and are now in the output."""
    placed = output.layout.tensors[tensor]
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if read_digest(fd, offset, placed.bytes) != sha256:
            return False
        _copy(fd, offset, output, placed)
    finally:
        os.close(fd)
    return True


def _copy(fd: int, offset: int, output: Output, placed: PlacedTensor) -> None:
    """By the kernel, which shares the blocks where the file system can; else through memory."""
    to, size = placed.offset, placed.bytes
    while size:
        try:
            n = os.copy_file_range(fd, output.fds[placed.part], min(size, COPY_BYTES), offset, to)
        except OSError as e:
            if e.errno not in _ELSEWHERE:
                e.filename = str(output.partials[placed.part])
                raise
            n = 0
        if not n:
            data = os.pread(fd, min(size, 4 * 2**20), offset)
            if not data:
                raise InputError(
                    f"{output.path}: a finished file became shorter while it was copied"
                )
            output.put(placed.part, to, memoryview(data))
            n = len(data)
        offset, to, size = offset + n, to + n, size - n
