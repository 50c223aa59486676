"""Look at a release as a stranger would: every file there, whole, and what the manifest says of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quant import files
from quant.header import read_headers
from quant.release import list_problems, names, read_checksums, read_manifest
from quant.shard import changed


def verify(folder: Path) -> tuple[str, ...]:
    """Everything that is not as the release's own lists say, in a line each; nothing means that the release is sound.

    Every byte is read. Raises InputError for a folder that is no release.
    """
    manifest = read_manifest(folder)
    broken = list(_file_problems(folder, read_checksums(folder)))
    return tuple(broken or _tensor_problems(folder, manifest))


def _file_problems(folder: Path, listed: Mapping[str, str]) -> Iterator[str]:
    here = names(folder)
    yield from list_problems(folder, here, listed)
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
