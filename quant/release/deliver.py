"""Deliver a release: every byte compared with what was packaged, then one rename."""

import json
from dataclasses import dataclass
from pathlib import Path

from quant.core import digest_cache, files
from quant.core.errors import CheckError, InputError, convert_disk_errors
from quant.release.folder import digest_cache_path
from quant.release.manifest import FORMAT, MANIFEST
from quant.release.package import Release


@dataclass(frozen=True)
class Delivery:
    """A release in its final folder."""

    folder: Path
    fresh: bool
    """False if it was there already."""


def deliver_release(release: Release, out: Path) -> Delivery:
    """Put a release at ``OUT/<name>``, or leave it alone if the same one is there.

    Raises:
        CheckError: If a file is no longer what was packaged.
        InputError: If something other than a release is in the way, or the disk is full.
    """
    target = out / release.name
    if is_delivered(release, target):
        return Delivery(target, fresh=False)
    if target.exists() and not _is_release(target):
        raise InputError(
            f"{target}: expected a release or nothing, found something else; name another folder"
        )
    with convert_disk_errors(out):
        partial = target.with_name(target.name + files.PARTIAL)
        # A killed run may have left one.
        files.remove(partial)
        for receipt in release.receipts:
            files.link_or_copy(release.folder / receipt.path, partial / receipt.path)
        # Links share their bytes with the store: what changed there since packaging shows here.
        changed = [
            r.path for r in release.receipts if files.make_receipt(partial / r.path, partial) != r
        ]
        if changed:
            files.remove(partial)
            raise CheckError(
                *(
                    f"{release.folder / name}: its bytes are not those that were packaged;"
                    f" delete {release.folder} and run again"
                    for name in changed
                )
            )
        _replace_folder(partial, target)
        # By the final paths, so that publishing does not read the files once more.
        digest_cache.save_digests(
            {target / r.path: r.sha256 for r in release.receipts}, digest_cache_path(target)
        )
    return Delivery(target, fresh=True)


def is_delivered(release: Release, target: Path) -> bool:
    """Return whether a release is there: the same manifest, and every file in its full length."""
    try:
        # Lengths are enough: the manifest has every digest, and the folder got its name after all
        # files were compared. `quant verify` reads the bytes.
        same = (target / MANIFEST).read_bytes() == (release.folder / MANIFEST).read_bytes()
        return same and all((target / r.path).stat().st_size == r.bytes for r in release.receipts)
    except OSError:
        return False


def _replace_folder(partial: Path, target: Path) -> None:
    """Give a folder its final name, in place of an older one."""
    older = target.with_name(target.name + ".replaced")
    files.remove(older)
    # rename(2) replaces no folder that has content. A kill between the two renames leaves none at
    # the final name; the next run delivers it.
    if target.exists():
        target.rename(older)
    files.commit_folder(partial, target)
    files.remove(older)


def _is_release(folder: Path) -> bool:
    """Return whether a folder is a release, which may be replaced."""
    try:
        name = json.loads((folder / MANIFEST).read_text())["format"]
        # Of any version of the format. A manifest.json alone is not enough: many programs write
        # one.
        return bool(name.rpartition(" ")[0] == FORMAT.rpartition(" ")[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
