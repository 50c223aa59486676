"""Which chunks of a file are written: an append-only journal of short records beside the file.

A record is appended as soon as the kernel has the chunk's bytes. So a killed process loses only the
chunks it was working on. A power cut loses more: every second the data is flushed to the disk, and
a mark in the journal says how many records the flush covers. After a reboot, which the kernel's
boot id shows, only those records are trusted.

No database (SQLite, LMDB): it would flush at every commit, or need the same two levels of trust
on top. The format is 36 bytes a record and has tests for cuts and flips at every byte.
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
"""Magic, the sha256 of what the work is bound to, and the boot id."""
RECORD = struct.Struct("<IIddI")
"""Tensor, chunk, the two sums of the chunk's error, and a crc32 of these."""
MARK = 2**32 - 1
"""In the field of the tensor: this record is a mark, and the error is the number it covers."""


class ErrorSums(NamedTuple):
    """The quantization error of a chunk, measured on some of its rows.

    error / signal is the relative weighted mean squared error: Σ w (q - x)² / Σ w x², with the
    imatrix (or the Hessian) as weights w.
    """

    error: float
    """Weighted squared differences."""
    signal: float
    """Weighted squared weights."""


Entries = Mapping[tuple[int, int], ErrorSums]
"""By tensor, in the order of the layout, and chunk."""


@dataclass
class Journal:
    """The journal of one file, open for appending."""

    fd: int
    records: int
    """Records written. A flush covers those that were there when it began."""
    marked: int
    """Records that the last mark covers."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tensor: int, chunk: int, sums: ErrorSums) -> None:
        """Record that the kernel has the chunk's bytes."""
        with self.lock:
            _append(self.fd, _pack_record(tensor, chunk, sums))
            self.records += 1

    def mark(self, records: int) -> None:
        """Record that the data of so many records is on the disk."""
        with self.lock:
            # Only after the data was flushed: a mark that reached the disk first would vouch for
            # bytes that a power cut took.
            _append(self.fd, _pack_record(MARK, 0, ErrorSums(float(records), 0.0)))
        os.fdatasync(self.fd)
        self.marked = records

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def journal_path(output: Path) -> Path:
    """Return the path of a file's journal."""
    return output.with_name(output.name + SUFFIX)


def read_boot_id() -> bytes:
    """Return the 36 bytes that the kernel draws at every start of the machine."""
    return BOOT_ID.read_bytes().strip().ljust(36)[:36]


def read_journal(path: Path, bound_to: bytes, boot_id: bytes) -> dict[tuple[int, int], ErrorSums]:
    """Return the entries of a journal that can be trusted.

    Args:
        path: The journal; it may be missing.
        bound_to: The sha256 of what the work depends on. A journal of other work has no entries.
        boot_id: The machine's boot id. If it changed, only marked entries are returned.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    if len(data) < HEAD.size or HEAD.unpack_from(data)[:2] != (MAGIC, bound_to):
        return {}
    entries: list[tuple[tuple[int, int], ErrorSums]] = []
    covered = 0
    for offset in range(HEAD.size, len(data) - RECORD.size + 1, RECORD.size):
        tensor, chunk, error, signal, crc = RECORD.unpack_from(data, offset)
        if crc != zlib.crc32(data[offset : offset + RECORD.size - 4]):
            break  # The record was cut short when the run ended. Nothing after it is trusted.
        if tensor == MARK:
            covered = int(error)
        else:
            entries.append(((tensor, chunk), ErrorSums(error, signal)))
    same_boot = HEAD.unpack_from(data)[2] == boot_id
    return dict(entries if same_boot else entries[:covered])


def start_journal(path: Path, bound_to: bytes, boot_id: bytes, entries: Entries) -> Journal:
    """Return a new journal with these entries, all of them marked. It replaces an older one.

    The data of the entries must be on the disk already.
    """
    # Written anew, not appended to: a cut-off record at the end would hide all later ones.
    with files.open_atomic(path) as f:
        f.write(HEAD.pack(MAGIC, bound_to, boot_id))
        for (tensor, chunk), sums in entries.items():
            f.write(_pack_record(tensor, chunk, sums))
        f.write(_pack_record(MARK, 0, ErrorSums(float(len(entries)), 0.0)))
    return Journal(os.open(path, os.O_WRONLY | os.O_APPEND), len(entries), len(entries))


def _pack_record(tensor: int, chunk: int, sums: ErrorSums) -> bytes:
    packed = RECORD.pack(tensor, chunk, sums.error, sums.signal, 0)[:-4]
    return packed + struct.pack("<I", zlib.crc32(packed))


def _append(fd: int, record: bytes) -> None:
    """Write one record. Raise OSError if the disk is full.

    Half a record fails its checksum, and what follows it is never read.
    """
    if os.write(fd, record) != len(record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
