"""Fetch files of one commit in a child program, and end a transfer that hangs.

The hub's fast transfer (Xet, native code) has been seen to hang at the end of large pulls, and
huggingface_hub has no timeout for it. So the bytes on the disk are watched from outside. When
nothing moved for a long time, the child is ended and another one goes on without Xet, which the
client allows for files of up to 50 GB. This watchdog is written by hand because only the end of a
process ends a thread that hangs in native code.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quant.core import child, files, progress
from quant.core.errors import Unreachable

STALL_SECONDS = 900.0
"""A transfer that moved nothing for so long is ended; QUANT_STALL_SECONDS sets another time."""
# MAX_HTTP_DOWNLOAD_SIZE in huggingface_hub/constants.py.
MAX_PLAIN_BYTES = 50 * 10**9
"""The largest file that the client fetches without Xet."""
DIGEST_CACHE = "fetched.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFile:
    """One file of a commit. The hub lists large files by sha256 and small ones by git's digest."""

    path: str
    bytes: int
    sha256: str | None = None
    git: str | None = None


class TransferStallError(Exception):
    """Nothing moved for too long."""


@dataclass
class TransferWatch:
    """Watches a folder that is being filled: reports progress, and raises when nothing moves."""

    folder: Path
    total: int
    """Bytes of all files."""
    stall_seconds: float
    state: tuple[int, ...] = ()
    since: float = field(default_factory=time.monotonic)
    """When the state last changed."""

    def __call__(self) -> None:
        """Look once. Raises TransferStallError if nothing moved for too long."""
        size, state = count_bytes(self.folder)
        if state != self.state:
            self.state, self.since = state, time.monotonic()
            progress.report_progress(min(size / max(self.total, 1), 1.0))
        elif time.monotonic() - self.since > self.stall_seconds:
            raise TransferStallError


def download_files(repo: str, revision: str, wanted: Sequence[HubFile], folder: Path) -> None:
    """Fetch files of a commit into a folder, each compared with the hub's list when it is there.

    Files that are there already and have the right digest are not fetched again.

    Args:
        repo: OWNER/NAME.
        revision: The commit.
        wanted: What the hub lists of the files.
        folder: Where to put them. Its parent holds the job, its log and the digest cache.

    Raises:
        CheckError: Files whose bytes are not those that the hub lists. They are removed.
        InputError: The hub refuses for good, or the disk is full.
        Unreachable: The hub did not deliver; the same call continues.
    """
    work = folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "repo": repo,
        "revision": revision,
        "folder": str(folder),
        "digest_cache": str(work / DIGEST_CACHE),
        "files": [asdict(f) for f in wanted],
    }
    stall_seconds = float(os.environ.get("QUANT_STALL_SECONDS", STALL_SECONDS))
    total = sum(f.bytes for f in wanted)
    problem = f"{repo}@{revision}: nothing moved for {stall_seconds:.0f} s"
    try:
        _run_downloader(job, work, TransferWatch(folder, total, stall_seconds), {})
    except TransferStallError:
        if max((f.bytes for f in wanted), default=0) > MAX_PLAIN_BYTES:
            raise Unreachable(f"{problem}; run again to continue") from None
        log.info("%s: nothing moved for %.0f s; going on without Xet", repo, stall_seconds)
        # By the environment of a new process: the client reads it once, when it is imported.
        plain = {"HF_HUB_DISABLE_XET": "1"}
        try:
            _run_downloader(job, work, TransferWatch(folder, total, stall_seconds), plain)
        except TransferStallError:
            raise Unreachable(f"{problem}, without Xet either; run again to continue") from None
    for name in (DIGEST_CACHE, child.LOG):
        files.remove(work / name)


def _run_downloader(
    job: Mapping[str, Any], work: Path, watch: TransferWatch, settings: Mapping[str, str]
) -> None:
    child.run_child(
        "quant.hub.downloader",
        job,
        folder=work,
        name="the downloader",
        env=os.environ | dict(settings),
        meanwhile=watch,
    )


def count_bytes(folder: Path) -> tuple[int, tuple[int, ...]]:
    """Return the bytes of a folder's files, and a state that changes with every write to it."""
    size = times = count = 0
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except OSError:  # renamed since it was listed
            continue
        # Allocated blocks (units of 512 bytes), not lengths: the client makes files at their full
        # length and fills them in any order.
        size += stat.st_blocks * 512 * path.is_file()
        # For writes into blocks that were allocated before.
        times += stat.st_mtime_ns
        count += 1
    return size, (size, times, count)
