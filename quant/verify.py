"""Look at a release as a stranger would: every file there, whole, and what the manifest says of it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quant import files
from quant.errors import InputError
from quant.header import read_headers
from quant.package import CHECKSUMS, FORMAT, MANIFEST
from quant.shard import changed


def verify(folder: Path) -> tuple[str, ...]:
    """Everything that is not as the release's own lists say, in a line each; nothing means that the release is sound.

    Every byte is read. Raises InputError for a folder that is no release.
    """
    manifest = _manifest(folder)
    broken = list(_file_problems(folder, _listed(folder)))
    return tuple(broken or _tensor_problems(folder, manifest))


def _manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except OSError as e:
        raise InputError(f"{path}: expected the manifest of a release, found none ({e.strerror})") from e
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise InputError(f"{path}: format: expected {FORMAT!r}, found {found!r}")
    return manifest


def _listed(folder: Path) -> dict[str, str]:
    """Digest by file, from SHA256SUMS."""
    path = folder / CHECKSUMS
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if outside := [name for name in listed if not name or Path(name).is_absolute() or ".." in Path(name).parts]:
        raise InputError(f"{path}: expected names inside the release, found {outside[0]!r}")
    return listed


def _file_problems(folder: Path, listed: Mapping[str, str]) -> Iterator[str]:
    here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST, CHECKSUMS}
    yield from (f"{folder / name}: missing; {CHECKSUMS} lists it" for name in sorted(listed.keys() - here))
    yield from (
        f"{folder / name}: not of this release; {CHECKSUMS} does not list it" for name in sorted(here - listed.keys())
    )
    for name in sorted(here & listed.keys()):
        if (found := files.digest(folder / name)) != listed[name]:
            yield f"{folder / name}: expected sha256 {listed[name]}, found {found}"


def _tensor_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Files that are what SHA256SUMS says, and yet hold other tensors than the manifest promises."""
    for variant in manifest["variants"]:
        headers = read_headers(folder / variant["files"][0]["path"])
        found = {name: digest for h in headers for name, digest in h.tensor_digests().items()}
        types = {t.name: t.type.name for h in headers for t in h.tensors}
        yield from changed({n: t["sha256"] for n, t in variant["tensors"].items()}, found, folder / variant["name"])
        for name, tensor in variant["tensors"].items():
            if types.get(name) != tensor["type"]:
                yield f"{variant['name']}: tensor {name}: expected {tensor['type']}, found {types.get(name)}"
