"""Which chunks of a file are written: an append-only file of short records beside it.

A record is written as soon as the chunk's bytes are with the kernel, so whatever ends the process loses only chunks in
work. What ends the machine loses more: so every second or so the data is flushed to the disk and a mark says how many
records it covers. After a reboot (the boot id tells) only these are believed.
"""

import errno
import os
import struct
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from quant.core import files

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SUFFIX = ".journal"
MAGIC = b"GFJ1"
HEAD = struct.Struct("<4s32s36s")
RECORD = struct.Struct("<IIddI")
"""Tensor, chunk, the two sums of its error, and a crc32 of these."""
MARK = 2**32 - 1
"""Stands for the tensor in a record that says: as many records as its second field are on the disk."""


class BlockSums(NamedTuple):
    """What a chunk lost, measured on some of its rows."""

    error: float
    """Squared differences, weighted by the imatrix."""
    whole: float
    """Squared weights, weighted likewise."""


Entries = Mapping[tuple[int, int], BlockSums]
"""By tensor, as the layout counts them, and chunk."""


@dataclass
class Journal:
    """The journal of one file, open for more."""

    fd: int
    records: int
    """How many were written; a flush covers those that were there when it began."""
    marked: int
    """How many the last mark covers."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tensor: int, chunk: int, sums: BlockSums) -> None:
        """The chunk's bytes are written."""
        with self.lock:
            _write(self.fd, _record(tensor, chunk, sums))
            self.records += 1

    def mark(self, records: int) -> None:
        """So many records are true even after a power cut."""
        with self.lock:
            _write(self.fd, _record(MARK, 0, BlockSums(float(records), 0.0)))
        os.fdatasync(self.fd)
        self.marked = records

    def close(self) -> None:
        """Nothing more is written."""
        os.close(self.fd)


def journal_path(output: Path) -> Path:
    """Where the journal of a file is."""
    return output.with_name(output.name + SUFFIX)


def read_boot_id() -> bytes:
    """Names the time since the machine was started."""
    return BOOT_ID.read_bytes().strip().ljust(36)[:36]


def read_journal(path: Path, bound: bytes, now: bytes) -> dict[tuple[int, int], BlockSums]:
    """What can be believed of a journal: nothing where it is bound to something else, or is not there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    if len(data) < HEAD.size or HEAD.unpack_from(data)[:2] != (MAGIC, bound):
        return {}
    found: list[tuple[tuple[int, int], BlockSums]] = []
    covered = 0
    for at in range(HEAD.size, len(data) - RECORD.size + 1, RECORD.size):
        tensor, chunk, error, whole, crc = RECORD.unpack_from(data, at)
        if crc != zlib.crc32(data[at : at + RECORD.size - 4]):
            break  # cut short by whatever ended the run
        if tensor == MARK:
            covered = int(error)
        else:
            found.append(((tensor, chunk), BlockSums(error, whole)))
    same_boot = HEAD.unpack_from(data)[2] == now
    return dict(found if same_boot else found[:covered])


def start_journal(path: Path, bound: bytes, now: bytes, entries: Entries) -> Journal:
    """A journal that begins with these entries, whose chunks are on the disk; it replaces what was there."""
    with files.open_atomic(path) as f:
        f.write(HEAD.pack(MAGIC, bound, now))
        for (tensor, chunk), sums in entries.items():
            f.write(_record(tensor, chunk, sums))
        f.write(_record(MARK, 0, BlockSums(float(len(entries)), 0.0)))
    return Journal(os.open(path, os.O_WRONLY | os.O_APPEND), len(entries), len(entries))


def _record(tensor: int, chunk: int, sums: BlockSums) -> bytes:
    packed = RECORD.pack(tensor, chunk, sums.error, sums.whole, 0)[:-4]
    return packed + struct.pack("<I", zlib.crc32(packed))


def _write(fd: int, record: bytes) -> None:
    """Raises OSError for a full disk; what is half there is no record, and what follows it is never read."""
    if os.write(fd, record) != len(record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
