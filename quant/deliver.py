"""Deliver a release into the folder that was asked for: every byte compared with what was packaged, then one rename."""

import json
from dataclasses import dataclass
from pathlib import Path

from quant import files, memory
from quant.errors import CheckFailed, InputError, disk_errors
from quant.package import FORMAT, MANIFEST, Release
from quant.release import memory_of


@dataclass(frozen=True)
class Delivered:
    """Where a release stands for others to take."""

    folder: Path
    fresh: bool
    """False when it stood there already."""


def deliver(release: Release, out: Path) -> Delivered:
    """The release as ``OUT/<name>``. One that stands there already is left alone.

    Raises CheckFailed when a file is no longer what was packaged, InputError when something else is in the way.
    """
    target = out / release.name
    if is_delivered(release, target):
        return Delivered(target, fresh=False)
    if target.exists() and not _is_release(target):
        raise InputError(f"{target}: expected a release or nothing, found something else; name another folder")
    with disk_errors(out):
        partial = target.with_name(target.name + files.PARTIAL)
        files.remove(partial)
        for receipt in release.receipts:
            files.share(release.folder / receipt.path, partial / receipt.path)
        if wrong := [r.path for r in release.receipts if files.receipt(partial / r.path, partial) != r]:
            files.remove(partial)
            mend = f"take away {release.folder} and run again"
            raise CheckFailed(
                *(f"{release.folder / n}: its bytes are not those that were packaged; {mend}" for n in wrong)
            )
        older = target.with_name(target.name + ".replaced")
        files.remove(older)
        if target.exists():
            target.rename(older)
        files.settle(partial, target)
        files.remove(older)
        memory.remember({target / r.path: r.sha256 for r in release.receipts}, memory_of(target))
    return Delivered(target, fresh=True)


def _is_release(folder: Path) -> bool:
    """Whether it is one of ours, which may be replaced; many things bring a file called manifest.json."""
    try:
        found = json.loads((folder / MANIFEST).read_text())["format"]
        return bool(found.rpartition(" ")[0] == FORMAT.rpartition(" ")[0])  # of any version
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def is_delivered(release: Release, target: Path) -> bool:
    """Whether that release stands there: the same manifest, and every file in its full length."""
    try:
        same = (target / MANIFEST).read_bytes() == (release.folder / MANIFEST).read_bytes()
        return same and all((target / r.path).stat().st_size == r.bytes for r in release.receipts)
    except OSError:
        return False
