"""A release folder as somebody finds it: its manifest, its list of checksums, and whether its files are those."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.core import digest_cache, files
from quant.core.files import Receipt
from quant.errors import CheckError, InputError
from quant.release.package import CHECKSUMS, FORMAT, MANIFEST

HUBS_OWN = (".gitattributes", ".cache/")
SIGNATURE = "model.sig"
"""Speaks of all other files, the lists too; so no list can hold it."""
LISTS = (CHECKSUMS, MANIFEST, SIGNATURE)


@dataclass(frozen=True)
class ReleaseFolder:
    """A release folder whose files were compared with its list."""

    folder: Path
    manifest: Mapping[str, Any]
    files: tuple[Receipt, ...]
    """All of them, the manifest, the list and the signature too."""

    @property
    def digest(self) -> str:
        """The sha256 of the manifest, which names the release: it holds whatever went in."""
        return next(r.sha256 for r in self.files if r.path == MANIFEST)


def open_release(folder: Path) -> ReleaseFolder:
    """The release in a folder. Digests that were remembered there are used again for files that nobody touched since.

    Raises InputError for a folder that is no release, CheckFailed with every file that is not what its list says.
    """
    manifest, listed = read_manifest(folder), read_checksums(folder)
    here = list_names(folder)
    wrong = list(list_problems(folder, here, listed))
    both = sorted(here & listed.keys())
    known = digest_cache.hash_files((folder / name for name in both), digest_cache_path(folder))
    wrong += [
        f"{folder / name}: was changed since it was made: expected sha256 {listed[name]}, found {known[folder / name]}"
        for name in both
        if known[folder / name] != listed[name]
    ]
    if wrong:
        raise CheckError(*wrong)
    receipts = [Receipt(name, listed[name], (folder / name).stat().st_size) for name in both]
    lists = [name for name in LISTS if (folder / name).is_file()]
    receipts += [files.make_receipt(folder / name, folder) for name in lists]
    return ReleaseFolder(folder, manifest, tuple(sorted(receipts, key=lambda r: r.path)))


def digest_cache_path(folder: Path) -> Path:
    """Where the digests of a release are remembered: beside it, because they speak of this machine's files."""
    return folder.with_name(f"{folder.name}.digests.json")


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of a release. Raises InputError when there is none, or one of something else."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except OSError as e:
        raise InputError(
            f"{path}: expected the manifest of a release, found none ({e.strerror})"
        ) from e
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise InputError(f"{path}: format: expected {FORMAT!r}, found {found!r}")
    return manifest


def read_checksums(folder: Path) -> dict[str, str]:
    """Digest by file, from SHA256SUMS. Raises InputError when it cannot be read, or names what lies outside."""
    path = folder / CHECKSUMS
    try:
        return parse_checksums(path.read_text(), str(path))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def parse_checksums(text: str, where: str) -> dict[str, str]:
    """Digest by file, from the text of such a list."""
    listed = {
        name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())
    }
    if outside := [
        name for name in listed if not name or Path(name).is_absolute() or ".." in Path(name).parts
    ]:
        raise InputError(f"{where}: expected names inside the release, found {outside[0]!r}")
    return listed


def list_names(folder: Path) -> set[str]:
    """Every file of a release but its lists and its signature, and but what the hub and its client put beside them."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith(HUBS_OWN)} - {*LISTS}


def list_problems(folder: Path, here: set[str], listed: Mapping[str, str]) -> Iterator[str]:
    """Files that the list has and the folder has not, or the other way round."""
    yield from (
        f"{folder / name}: missing; {CHECKSUMS} lists it" for name in sorted(listed.keys() - here)
    )
    yield from (
        f"{folder / name}: not of this release; {CHECKSUMS} does not list it"
        for name in sorted(here - listed.keys())
    )
