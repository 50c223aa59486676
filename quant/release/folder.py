"""A release folder: its manifest, its checksums, and whether its files are the listed ones."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quant.core import digest_cache, files
from quant.core.errors import CheckError, InputError
from quant.core.files import Receipt
from quant.release.manifest import MANIFEST, Manifest

CHECKSUMS = "SHA256SUMS"
"""Digests of every file but the manifest, the signature and itself, for ``sha256sum --check``."""
PROVENANCE = "provenance.json"
README = "README.md"
"""The model card."""
SIGNATURE = "model.sig"
"""Covers all other files, the lists too; so no list can hold it."""
LISTS = (CHECKSUMS, MANIFEST, SIGNATURE)
HUB_FILES = (".gitattributes", ".cache/")
"""What the hub and its client add to a folder."""


@dataclass(frozen=True)
class ReleaseFolder:
    """A release folder whose files were compared with its list."""

    folder: Path
    manifest: Manifest
    files: tuple[Receipt, ...]
    """All of them, with the manifest, the list and the signature."""

    @property
    def digest(self) -> str:
        """The sha256 of the manifest, which has every input's digest: it identifies the release."""
        return next(r.sha256 for r in self.files if r.path == MANIFEST)


def open_release(folder: Path) -> ReleaseFolder:
    """Return the release in a folder, every file compared with its list.

    Digests from the cache beside the folder stand for files that were not touched since: 700 GB are
    not read again.

    Raises:
        InputError: If the folder is no release.
        CheckError: With every file that is missing, not listed, or not what the list says.
    """
    manifest, listed = Manifest.read(folder / MANIFEST), read_checksums(folder)
    present = list_names(folder)
    problems = list(find_list_problems(folder, present, listed))
    both = sorted(present & listed.keys())
    actual = digest_cache.hash_files((folder / name for name in both), digest_cache_path(folder))
    problems += [
        f"{folder / name}: was changed since it was made: expected sha256 {listed[name]},"
        f" found {actual[folder / name]}"
        for name in both
        if actual[folder / name] != listed[name]
    ]
    if problems:
        raise CheckError(*problems)
    receipts = [Receipt(name, listed[name], (folder / name).stat().st_size) for name in both]
    # No list names these, and they are small, so they are hashed here.
    lists = [name for name in LISTS if (folder / name).is_file()]
    receipts += [files.make_receipt(folder / name, folder) for name in lists]
    return ReleaseFolder(folder, manifest, tuple(sorted(receipts, key=lambda r: r.path)))


def digest_cache_path(folder: Path) -> Path:
    """Return where the digests are cached: beside the release, since they are this machine's."""
    return folder.with_name(f"{folder.name}.digests.json")


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every listed file. Raises InputError as :func:`parse_checksums`."""
    path = folder / CHECKSUMS
    try:
        return parse_checksums(path.read_text(), str(path))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def parse_checksums(text: str, where: str) -> dict[str, str]:
    """Return the sha256 of every file that the text of SHA256SUMS lists, by name.

    Args:
        text: Lines of ``sha256``, two blanks, name.
        where: Names the list in errors.

    Raises:
        InputError: If a name leads out of the release.
    """
    # The first two blanks end the digest; a name may contain others.
    lines = (line.partition("  ") for line in text.splitlines())
    listed = {name: digest for digest, _, name in lines}
    for name in listed:
        # The list may be a stranger's: `quant verify` reads it from any folder, publishing from the
        # hub.
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{where}: expected names inside the release, found {name!r}")
    return listed


def hash_lists(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file but the signature: the listed ones, and the lists."""
    return read_checksums(folder) | {
        name: files.hash_file(folder / name) for name in (CHECKSUMS, MANIFEST)
    }


def list_names(folder: Path) -> set[str]:
    """Return the files of a release without its lists, its signature, and what the hub adds."""
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in names if not name.startswith(HUB_FILES)} - {*LISTS}


def find_list_problems(folder: Path, present: set[str], listed: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each file that is listed and missing, or present and not listed."""
    yield from (
        f"{folder / name}: missing; {CHECKSUMS} lists it"
        for name in sorted(listed.keys() - present)
    )
    yield from (
        f"{folder / name}: not of this release; {CHECKSUMS} does not list it"
        for name in sorted(present - listed.keys())
    )
