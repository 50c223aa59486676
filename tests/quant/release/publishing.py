"""Release folders to publish, and what the stand-in of the hub shows of them afterwards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quant.core.files import Receipt
from quant.hub.upload import Destination
from quant.release.change import plan_change
from quant.release.folder import CHECKSUMS
from quant.release.manifest import MANIFEST, SourceRecord
from quant.release.publish import Publication, publish_release
from tests import hub as hubs
from tests.hub import Hub
from tests.quant.release.folders import with_license
from tests.quant.release.manifests import make_manifest

quiet_client = pytest.mark.filterwarnings("ignore:Use 'content=")
"""The hub's client warns about its own calls of its HTTP library."""
REPO = "somebody/tiny-GGUF"
CARD = b"---\nlicense: mit\n---\n# tiny\n"
CONTENT: Mapping[str, bytes] = {
    "README.md": CARD,
    "params": b"{}",
    "tiny-UD-TQ1_0.gguf": b"one file" * 100,
    "UD-Q2_K_XL/tiny-UD-Q2_K_XL-00001-of-00002.gguf": b"first" * 1000,
    "UD-Q2_K_XL/tiny-UD-Q2_K_XL-00002-of-00002.gguf": b"second" * 1000,
}
SMALL: Mapping[str, bytes] = {
    "README.md": CARD,
    "tiny-UD-TQ1_0.gguf": b"one file" * 100,
    "tiny-UD-Q2_K_XL.gguf": b"two parts" * 300,
}
"""The same kinds of request as CONTENT, in the smallest number: some tests fail each in turn."""


def write_release(
    folder: Path, content: Mapping[str, bytes] = CONTENT, license_name: str = "mit"
) -> Path:
    """Write a release folder as a build leaves it."""
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    sums = {name: hubs.sha256(data) for name, data in content.items()}
    write_lists(folder, sums, license_name)
    return folder


def write_lists(folder: Path, sums: Mapping[str, str], license_name: str = "mit") -> None:
    """Write SHA256SUMS and a manifest that differs with it."""
    (folder / CHECKSUMS).write_text("".join(f"{sha}  {name}\n" for name, sha in sums.items()))
    files = tuple(Receipt(name, sha, 0) for name, sha in sums.items())
    manifest = make_manifest(
        recipe=with_license(license_name), source=SourceRecord(folder="tiny", files=files)
    )
    (folder / MANIFEST).write_text(manifest.to_json())


def publish(folder: Path, **destination: Any) -> Publication:
    """Publish a release folder in ``REPO``."""
    return publish_release(plan_change(folder, Destination(REPO, **destination)))


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def read_repo(the_hub: Hub) -> dict[str, bytes]:
    """Return every file of the repo's main branch, without what the hub itself put there."""
    blobs = the_hub.head(REPO).files if REPO in the_hub.repos else {}
    return {
        n: the_hub.object(b.sha256).read_bytes() for n, b in blobs.items() if n != ".gitattributes"
    }


def list_commits(the_hub: Hub) -> list[str]:
    """Return the titles of the repo's commits without the first, which the hub makes."""
    return [c.title for c in the_hub.repos[REPO].commits.values() if c.parent]


def reset(the_hub: Hub) -> None:
    """Let the hub be as it was before anything was published."""
    the_hub.repos.clear()
    for path in (the_hub.folder / "objects").iterdir():
        path.unlink()
    the_hub.requests.clear()


def list_paths(the_hub: Hub, folder: Path) -> list[str]:
    """Return the paths that a publication asks for; the hub is reset afterwards."""
    for _ in range(2):  # the client's first publication in a process asks one thing more
        publish(folder)
        paths = [r.path for r in the_hub.requests]
        reset(the_hub)
    return paths


def count_requests(the_hub: Hub, folder: Path, **destination: Any) -> int:
    """Return how many requests a publication makes; the hub is reset afterwards."""
    for _ in range(2):  # as above
        publish(folder, **destination)
        count = len(the_hub.requests)
        reset(the_hub)
    return count
