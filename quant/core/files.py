"""Files that are whole or absent, and the receipts that say what was written.

The only module that puts anything under a final name: it is written beside that name, flushed to the disk, renamed,
and the folder's entry is flushed too. Who finds a file therefore finds all of it.
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
"""Ends the name of everything that is not finished."""


@dataclass(frozen=True)
class Receipt:
    """What a write left behind."""

    path: str
    """Relative to the folder that the receipt speaks of."""
    sha256: str
    bytes: int


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_git_blob(path: Path) -> str:
    """The name that git gives to a file's bytes; the hub knows small files by it."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def make_receipt(path: Path, root: Path) -> Receipt:
    """Read a file and say what it is, relative to ``root``."""
    return Receipt(path.relative_to(root).as_posix(), hash_file(path), path.stat().st_size)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that stands at ``path`` when the block ends well, and nowhere when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except BaseException as e:
        partial.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(path)  # a write on a full disk does not say where it wrote
        raise
    flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with open_atomic(path) as f:
        f.write(text.encode())


def commit_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its final name, once everything in it is on the disk."""
    for path in sorted(partial.rglob("*")):
        if path.is_file() and not path.is_symlink():
            flush_file(path)
        elif path.is_dir():
            flush_folder(path)
    flush_folder(partial)
    partial.rename(final)
    flush_folder(final.parent)


def flush_file(path: Path) -> None:
    """Wait until a file that something else wrote is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


flush_folder = flush_file
"""A folder is flushed like a file: its entries are its bytes."""


@contextmanager
def temp_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside a file that is being made by others; it is gone afterwards, whatever happened."""
    folder = final.resolve().with_name(final.name + PARTIAL)
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def replace_atomically(made: Path, final: Path) -> None:
    """Give a finished file its final name, once its bytes are on the disk."""
    flush_file(made)
    made.replace(final)
    flush_folder(final.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` hold the bytes of ``source``: a second name where the file system allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Take away a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
