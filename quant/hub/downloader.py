"""The child program that downloads, so that it can be ended when nothing moves.

See :mod:`quant.core.child` and :mod:`quant.hub.download`. The client compares lengths only, so each
file is compared with the hub's list by digest, as soon as it is there. huggingface_hub's
``HfApi.verify_repo_checksums`` compares the same digests, but not this way: it needs all files to
be there, lists the commit again, hashes everything anew (minutes for 700 GB, the digest cache does
not help), and counts every file of the repo that was not wanted as missing.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from quant.core import child, digest_cache, files
from quant.core.errors import CheckError, convert_disk_errors
from quant.hub import client as hub_client
from quant.hub.download import HubFile

# Files at a time. hf_hub_download fetches one, and snapshot_download's default is 8 as well.
THREADS = 8


def download_job(job: Mapping[str, Any], _: Path) -> None:
    """Fetch the files of a job.

    Raises:
        CheckError: Files whose bytes are not those that the hub lists.
    """
    with (
        convert_disk_errors(Path(job["folder"])),
        hub_client.convert_errors(job["repo"], job["revision"]),
    ):
        if problems := list(download_all(job)):
            raise CheckError(*problems)


def download_all(job: Mapping[str, Any]) -> Iterator[str]:
    """Fetch every file that is not there yet, and yield a line for each that is wrong.

    A wrong file is removed, so that the next run fetches it again.
    """
    folder, cache = Path(job["folder"]), Path(job["digest_cache"])
    wanted = [HubFile(**f) for f in job["files"]]
    missing = [f for f in wanted if find_difference(folder, f, cache)]
    threads = ThreadPoolExecutor(THREADS)
    downloads = {threads.submit(_download_file, job, f.path): f for f in missing}
    for future in as_completed(downloads):
        future.result()
        if difference := find_difference(folder, downloads[future], cache):
            files.remove(folder / downloads[future].path)
            yield f"{job['repo']}@{job['revision']}: {difference}; run again to fetch it again"
    threads.shutdown()


def find_difference(folder: Path, f: HubFile, cache: Path) -> str | None:
    """Return how a file differs from what the hub lists, or None. Digests are remembered."""
    path = folder / f.path
    if not path.is_file():
        return f"{f.path}: missing"
    if (size := path.stat().st_size) != f.bytes:
        return f"{f.path}: expected {f.bytes} bytes, found {size}"
    if f.sha256:
        sha256 = digest_cache.hash_files([path], cache)[path]
        if sha256 != f.sha256:
            return f"{f.path}: expected sha256 {f.sha256}, found {sha256}"
        return None
    # A small file, which the hub lists by git's digest only.
    git = files.hash_git_blob(path)
    return None if git == f.git else f"{f.path}: expected git's {f.git}, found {git}"


def _download_file(job: Mapping[str, Any], path: str) -> None:
    hub_client.make_client().hf_hub_download(
        job["repo"], path, revision=job["revision"], local_dir=job["folder"]
    )


if __name__ == "__main__":
    child.run_job(download_job)
