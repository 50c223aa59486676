"""Download files in a process of its own, so that it can be ended when nothing moves.

``python -m quant.hub.downloader JOB OUTCOME``, both JSON.

Left alone, the hub's client ends every file that it has begun, and a transfer that hangs in native code ends never. Every
file is compared with the hub's list as soon as it is there; the client itself compares lengths only.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from quant.core import child, digest_cache, files
from quant.errors import CheckError, convert_disk_errors
from quant.hub import client as hub_client

THREADS = 8


def download_job(job: Mapping[str, Any], _: Path) -> None:
    """Fetch what the job says. Raises CheckError for files that came otherwise."""
    with (
        convert_disk_errors(Path(job["folder"])),
        hub_client.convert_errors(job["repo"], job["revision"]),
    ):
        if problems := list(download_all(job)):
            raise CheckError(*problems)


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
    child.run_job(download_job)
