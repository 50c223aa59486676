"""Deliver a release into the folder that was asked for: every byte compared with what was packaged, then one rename."""

import json
from dataclasses import dataclass
from pathlib import Path

from quant.core import digest_cache, files
from quant.errors import CheckError, InputError, convert_disk_errors
from quant.release.folder import digest_cache_path
from quant.release.package import FORMAT, MANIFEST, Release


@dataclass(frozen=True)
class Delivery:
    """Where a release stands for others to take."""

    folder: Path
    fresh: bool
    """False when it stood there already."""


def deliver_release(release: Release, out: Path) -> Delivery:
    """The release as ``OUT/<name>``. One that stands there already is left alone.

    Raises CheckFailed when a file is no longer what was packaged, InputError when something else is in the way.
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
        files.remove(partial)
        for receipt in release.receipts:
            files.link_or_copy(release.folder / receipt.path, partial / receipt.path)
        if wrong := [
            r.path for r in release.receipts if files.make_receipt(partial / r.path, partial) != r
        ]:
            files.remove(partial)
            mend = f"take away {release.folder} and run again"
            raise CheckError(
                *(
                    f"{release.folder / n}: its bytes are not those that were packaged; {mend}"
                    for n in wrong
                )
            )
        older = target.with_name(target.name + ".replaced")
        files.remove(older)
        if target.exists():
            target.rename(older)
        files.commit_folder(partial, target)
        files.remove(older)
        digest_cache.save_digests(
            {target / r.path: r.sha256 for r in release.receipts}, digest_cache_path(target)
        )
    return Delivery(target, fresh=True)


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
