"""Files that are complete or absent, and the receipts that record what was written.

This is the only module that gives a file its final name. A file is written beside that name,
flushed to the disk (``fsync``), renamed, and then its folder is flushed too. Without the second
flush a rename can be lost in a power failure; without the first one a complete name can point to a
file of zeros. So a file under its final name is complete.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Suffix of every name that is not finished."""


@dataclass(frozen=True)
class Receipt:
    """The name, digest and length of a file that was written."""

    path: str
    """Relative to the folder that the receipt belongs to."""
    sha256: str
    bytes: int


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_git_blob(path: Path) -> str:
    """Return git's object id of a file, in hex. The hub lists small files by it, not by sha256."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def make_receipt(path: Path, root: Path) -> Receipt:
    """Hash a file and return its receipt, with the path relative to ``root``."""
    return Receipt(path.relative_to(root).as_posix(), hash_file(path), path.stat().st_size)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` only if the block succeeds.

    Missing folders are made. A file that is already there stays until the new one is complete.

    Raises:
        OSError: Named after ``path``, also where the system names no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    # BaseException, because an interrupt must leave no partial file either.
    except BaseException as e:
        partial.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(path)  # write(2) on a full disk names no file
        raise
    flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with open_atomic(path) as f:
        f.write(text.encode())


def commit_folder(partial: Path, final: Path) -> None:
    """Flush everything in a finished folder and give the folder its final name."""
    # Everything before the rename: a journal may keep the rename and lose the data behind it.
    for path in sorted(partial.rglob("*")):
        if path.is_file() and not path.is_symlink():
            flush_file(path)
        elif path.is_dir():
            flush_folder(path)
    flush_folder(partial)
    partial.rename(final)
    flush_folder(final.parent)


def flush_file(path: Path) -> None:
    """Wait until a file that another program wrote is on the disk."""
    # fsync flushes all dirty pages of the file, whoever wrote them, and takes a descriptor that was
    # opened for reading.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


flush_folder = flush_file
"""A folder is flushed like a file: its entries are its bytes."""


@contextmanager
def temp_folder(final: Path) -> Iterator[Path]:
    """Make an empty folder beside a file that other programs produce, and remove it afterwards.

    It is on the disk of the final name, so that a rename can finish the work.
    """
    folder = final.resolve().with_name(final.name + PARTIAL)
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def replace_atomically(source: Path, final: Path) -> None:
    """Flush a finished file and give it its final name. Both names must be on one disk."""
    flush_file(source)
    source.replace(final)
    flush_folder(final.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source`` if the file system allows it, else a copy.

    Raises:
        FileExistsError: ``target`` exists.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as e:
        # Another disk, a file system without hard links (link(2) names EPERM for it), or too many
        # links. All else is an error.
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists. A link is removed, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
