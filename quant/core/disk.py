"""Free disk space: the one check before a large write, and the reason after a failed one.

A full disk in the middle of a long run costs hours, and native tools report it in words that
nobody can act on. So every step that writes much asks here first.
"""

import os
import resource
import shutil
from pathlib import Path

from quant.core.errors import InputError

FULL_BYTES = 4 * 2**20
"""A disk with less than this is full: tools write in pieces of about this size."""
FREE_SOME = "free some and run again"


def find_space_problem(
    path: Path, needed: int, *, purpose: str = "", advice: str = FREE_SOME
) -> str | None:
    """Return why the disk of a path cannot take so many more bytes, or None if it can.

    Args:
        path: The file or folder to write. It need not exist yet.
        needed: Bytes that will be written.
        purpose: What the bytes are for; stands behind "bytes free", such as " for the shards".
        advice: The next step for the user.

    Returns:
        One line in the form of all errors: path, expected, found, what to do.
    """
    free = measure_free_space(path)
    if needed <= free:
        return None
    return f"{path}: expected {needed:,} bytes free{purpose}, found {free:,}; {advice}"


def measure_free_space(path: Path) -> int:
    """Return the free bytes on the disk of a path, which need not exist yet."""
    return shutil.disk_usage(find_existing_folder(path)).free


def find_existing_folder(path: Path) -> Path:
    """Return the folder itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.resolve().parents) if p.is_dir())


def measure_folder(folder: Path) -> int:
    """Return the bytes of disk that a folder's files take. A file with two names counts once."""
    stats = (p.stat() for p in folder.rglob("*") if p.is_file())
    # A release's files are hard links to the store's. st_blocks counts units of 512 bytes on every
    # file system (stat(2)), and nothing for the holes of a sparse file.
    return sum({(s.st_dev, s.st_ino): s.st_blocks * 512 for s in stats}.values())


def reserve_file(path: Path, *, advice: str = FREE_SOME) -> None:
    """Reserve the disk space of a sparse file, before it is written through a memory map.

    Raises:
        InputError: The disk has no room for the file.
    """
    size = path.stat().st_size
    # A first write to a page of a sparse file's memory map ends the process by SIGBUS, without a
    # message, if the disk is full. ftruncate would only set the length and keep the holes.
    try:
        with path.open("r+b") as f:
            os.posix_fallocate(f.fileno(), 0, size)
    except OSError as e:
        raise InputError(
            f"{path.parent}: expected {size:,} bytes free for {path.name},"
            f" found {measure_free_space(path):,} ({e.strerror}); {advice}"
        ) from e


def find_write_problem(folder: Path) -> str | None:
    """Return why nothing more can be written in a folder, or None if something can.

    Called after a native program failed: most do not name a full disk as the reason.
    """
    if measure_free_space(folder) < FULL_BYTES:
        return "no space left"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    if any(p.stat().st_size >= limit for p in folder.rglob("*") if p.is_file()):
        return f"a file grew too large (the limit here is {limit} bytes)"
    return None
