"""Download files in a process of its own, so that it can be ended when nothing moves.

``python -m quant.hub.downloader JOB OUTCOME``, both JSON.

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

from quant.core import digest_cache, files
from quant.core.format import to_pretty_json
from quant.errors import CheckError, QuantError, convert_disk_errors
from quant.hub import client as hub_client

THREADS = 8


def main(job_path: Path, outcome_path: Path) -> None:
    """Fetch what the job says, write what became of it, and leave without waiting for what is still under way."""
    for ended in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ended, signal.SIG_DFL)
    job = json.loads(job_path.read_text())
    outcome: dict[str, Any] = {"kind": None, "problems": []}
    try:
        with (
            convert_disk_errors(Path(job["folder"])),
            hub_client.convert_errors(job["repo"], job["revision"]),
        ):
            if problems := list(download_all(job)):
                raise CheckError(*problems)
    except QuantError as e:
        outcome = {"kind": type(e).__name__, "problems": list(e.problems)}
    files.write_text(outcome_path, to_pretty_json(outcome))
    os._exit(0)


def download_all(job: Mapping[str, Any]) -> Iterator[str]:
    """Fetch every file of the job that is not there; yields a line for each that came otherwise, which is taken away."""
    folder, remembered = Path(job["folder"]), Path(job["memory"])
    missing = [f for f in job["files"] if find_difference(folder, f, remembered)]
    beside = ThreadPoolExecutor(THREADS)
    under_way = {beside.submit(_get, job, f): f for f in missing}
    for future in as_completed(under_way):
        future.result()
        if wrong := find_difference(folder, under_way[future], remembered):
            files.remove(folder / under_way[future]["path"])
            yield f"{job['repo']}@{job['revision']}: {wrong}; run again to fetch it again"
    beside.shutdown()


def find_difference(folder: Path, f: Mapping[str, Any], remembered: Path) -> str | None:
    """What is wrong with a file that should lie there; a digest that was compared is remembered."""
    path, name = folder / f["path"], f["path"]
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != f["bytes"]:
        return f"{name}: expected {f['bytes']} bytes, found {path.stat().st_size}"
    if f["sha256"]:
        found = digest_cache.hash_files([path], remembered)[path]
        return (
            None
            if found == f["sha256"]
            else f"{name}: expected sha256 {f['sha256']}, found {found}"
        )
    found = files.hash_git_blob(path)
    return None if found == f["git"] else f"{name}: expected git's {f['git']}, found {found}"


def _get(job: Mapping[str, Any], f: Mapping[str, Any]) -> None:
    hub_client.make_client().hf_hub_download(
        job["repo"], f["path"], revision=job["revision"], local_dir=job["folder"]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
