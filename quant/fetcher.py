"""The process that downloads: ``python -m quant.fetcher JOB OUTCOME``, both JSON, so that it can be ended when nothing moves.

Left alone, the hub's client ends every file that it has begun, and a transfer that hangs in native code ends never. Every
file is compared with the hub's list as soon as it is there; the client itself compares lengths only.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from quant import files, hub, memory
from quant.errors import CheckFailed, QuantError, disk_errors

THREADS = 8


def main(job_path: Path, outcome_path: Path) -> None:
    """Fetch what the job says, write what became of it, and leave without waiting for what is still under way."""
    for ended in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ended, signal.SIG_DFL)
    job = json.loads(job_path.read_text())
    outcome: dict[str, Any] = {"kind": None, "problems": []}
    try:
        with disk_errors(Path(job["folder"])), hub.errors(job["repo"], job["revision"]):
            if problems := list(fetch(job)):
                raise CheckFailed(*problems)
    except QuantError as e:
        outcome = {"kind": type(e).__name__, "problems": list(e.problems)}
    files.write_text(outcome_path, files.pretty(outcome))
    os._exit(0)


def fetch(job: Mapping[str, Any]) -> Iterator[str]:
    """Fetch every file of the job that is not there; yields a line for each that came otherwise, which is taken away."""
    folder, remembered = Path(job["folder"]), Path(job["memory"])
    missing = [f for f in job["files"] if difference(folder, f, remembered)]
    beside = ThreadPoolExecutor(THREADS)
    under_way = {beside.submit(_get, job, f): f for f in missing}
    for future in as_completed(under_way):
        future.result()
        if wrong := difference(folder, under_way[future], remembered):
            files.remove(folder / under_way[future]["path"])
            yield f"{job['repo']}@{job['revision']}: {wrong}; run again to fetch it again"
    beside.shutdown()


def difference(folder: Path, f: Mapping[str, Any], remembered: Path) -> str | None:
    """What is wrong with a file that should lie there; a digest that was compared is remembered."""
    path, name = folder / f["path"], f["path"]
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != f["bytes"]:
        return f"{name}: expected {f['bytes']} bytes, found {path.stat().st_size}"
    if f["sha256"]:
        found = memory.digests([path], remembered)[path]
        return None if found == f["sha256"] else f"{name}: expected sha256 {f['sha256']}, found {found}"
    found = files.git_digest(path)
    return None if found == f["git"] else f"{name}: expected git's {f['git']}, found {found}"


def _get(job: Mapping[str, Any], f: Mapping[str, Any]) -> None:
    hub.client().hf_hub_download(job["repo"], f["path"], revision=job["revision"], local_dir=job["folder"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
