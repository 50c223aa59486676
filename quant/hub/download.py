"""Fetch files of a commit in a process of its own, with an eye on the bytes that move: a transfer that hangs is ended.

The hub's fast transfer (Xet) has been seen to hang at the end of large pulls. When nothing moved for a long while, the
process is ended and another goes on without Xet, which the client allows for files of up to 50 GB.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.core import child, files, progress
from quant.errors import Unreachable

STALL_SECONDS = 900.0
"""With nothing moved for so long, a transfer is given up; a setting of QUANT_STALL_SECONDS."""
PLAIN_BYTES = 50 * 10**9
"""The longest file that the client fetches without Xet."""
LOG = logging.getLogger(__name__)


class TransferStallError(Exception):
    """Nothing moved for too long."""


@dataclass
class TransferWatch:
    """Looks at a folder that is being filled, and raises Stalled when it stays as it was for too long."""

    folder: Path
    total: int
    patience: float
    seen: tuple[int, ...] = ()
    since: float = field(default_factory=time.monotonic)

    def __call__(self) -> None:
        """Look once."""
        held, moved = count_bytes(self.folder)
        if moved != self.seen:
            self.seen, self.since = moved, time.monotonic()
            progress.report_progress(min(held / max(self.total, 1), 1.0))
        elif time.monotonic() - self.since > self.patience:
            raise TransferStallError


def download_files(
    repo: str, revision: str, wanted: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Let every file of that commit lie in the folder, each compared with the hub's list as soon as it was there.

    Raises CheckFailed for files that came otherwise, InputError for what is refused for good, Unreachable when the hub
    does not deliver.
    """
    work = folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "repo": repo,
        "revision": revision,
        "folder": str(folder),
        "memory": str(work / "fetched.json"),
        "files": wanted,
    }
    patience = float(os.environ.get("QUANT_STALL_SECONDS", STALL_SECONDS))
    largest = max((f["bytes"] for f in wanted), default=0)
    watch = TransferWatch(folder, sum(f["bytes"] for f in wanted), patience)
    try:
        _in_child(job, work, watch, {})
    except TransferStallError:
        if largest > PLAIN_BYTES:
            raise Unreachable(
                f"{repo}@{revision}: nothing moved for {patience:.0f} s; run again to continue"
            ) from None
        LOG.info("%s: nothing moved for %.0f s; going on without Xet", repo, patience)
        try:
            anew = TransferWatch(folder, watch.total, patience)
            _in_child(job, work, anew, {"HF_HUB_DISABLE_XET": "1"})
        except TransferStallError:
            raise Unreachable(
                f"{repo}@{revision}: nothing moved for {patience:.0f} s, without Xet either; run again to continue"
            ) from None
    for name in ("fetched.json", child.LOG):
        files.remove(work / name)


def _in_child(
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
    """Bytes of the files in a folder, and what changes whenever something is written there, in whatever order."""
    held = taken = count = 0
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except OSError:  # renamed in this moment
            continue
        held, taken, count = (
            held + stat.st_blocks * 512 * path.is_file(),
            taken + stat.st_mtime_ns,
            count + 1,
        )
    return held, (held, taken, count)
