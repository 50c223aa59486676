"""Send files to the hub's storage, where nobody sees them until a commit names them.

Files that the storage has already are not sent again. So sending early (each variant as soon as its
smoke test passed) and sending at the end are the same work.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING

from quant.core.files import Receipt
from quant.hub import client as hub_client

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


@dataclass(frozen=True)
class Destination:
    """Where and how a release is published."""

    repo: str
    private: bool = False
    """Make the repo private if it has to be made."""
    pull_request: bool = False
    """Open a pull request, which the repo's owners merge, instead of committing."""
    tag: str | None = None
    """None: release-<begin of the manifest's digest>."""
    parent: str | None = None
    """The commit to follow. None takes the repo's current one."""
    uploads: int = 4
    """Files that are sent at the same time."""
    limit: int | None = None
    """Upload bandwidth in bytes a second, all files together. None sets no limit."""


@dataclass(frozen=True)
class Upload:
    """What the hub's storage has after an upload."""

    repo: str
    files: int
    bytes: int


def upload_variant(
    paths: Mapping[str, Path], receipts: Iterable[Receipt], target: Destination
) -> Upload:
    """Send the files of one variant to the storage, before the release is published.

    The repo is made if it does not exist. The same call continues after an interruption.

    Args:
        paths: The files, by their names in the repo.
        receipts: Their receipts, in the same order.
        target: The repo, and how to send.

    Raises:
        InputError: The hub refuses.
        Unreachable: The hub does not answer.
    """
    variant = {name: (path, r) for (name, path), r in zip(paths.items(), receipts, strict=True)}
    digests = {name: (path, r.sha256) for name, (path, r) in variant.items()}
    with (
        hub_client.convert_errors(target.repo),
        prepare_additions(digests, target.limit) as additions,
    ):
        api = hub_client.make_client()
        hub_client.retry(
            lambda: api.create_repo(target.repo, private=target.private, exist_ok=True)
        )
        upload_files(api, additions, target)
    return Upload(target.repo, len(variant), sum(r.bytes for _, r in variant.values()))


def upload_files(api: "HfApi", additions: "list[CommitOperationAdd]", target: Destination) -> None:
    """Send what the storage lacks of these files."""
    _run_in_thread(
        lambda: api.preupload_lfs_files(
            target.repo,
            additions,
            num_threads=target.uploads,
            create_pr=target.pull_request,
            # quant.release.publish commits these objects later; the client would drop their files.
            free_memory=False,
        )
    )


@contextmanager
def prepare_additions(
    files: Mapping[str, tuple[Path, str]], limit: int | None
) -> "Iterator[list[CommitOperationAdd]]":
    """Yield files as the hub's client takes them. They are open while the block runs.

    Args:
        files: Path and sha256 of each file, by its name in the repo.
        limit: Bytes a second for all of them together; None for no limit.
    """
    from huggingface_hub import CommitOperationAdd

    limiter = RateLimiter(limit) if limit else None
    with ExitStack() as stack:
        additions = []
        for name, (path, sha256) in files.items():
            addition = CommitOperationAdd(name, path)
            # The client would read the whole file to hash it; the receipt has the digest.
            addition.upload_info.sha256 = bytes.fromhex(sha256)
            if limiter:
                # The client sends what it has to read through Python by HTTP, and not by Xet,
                # whose native code offers no bandwidth limit.
                throttled = stack.enter_context(ThrottledFile(path, limiter))
                addition.path_or_fileobj = throttled  # type: ignore[assignment]  # a binary file
            additions.append(addition)
        yield additions


@dataclass
class RateLimiter:
    """Limits the bytes a second that several threads take together.

    A leaky bucket without a burst: each request is scheduled behind the ones before it, and waits
    until its turn.
    """

    bytes_per_second: int
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = lambda seconds: time.sleep(seconds)
    free_at: float = 0.0
    """The time, by ``clock``, from which the next bytes may be sent."""
    lock: Lock = field(default_factory=Lock)

    def take(self, count: int) -> None:
        """Wait until so many bytes may be sent."""
        with self.lock:
            now = self.clock()
            # Time that nobody used is not saved up: after a pause no burst exceeds the limit.
            begin = max(now, self.free_at)
            self.free_at = begin + count / self.bytes_per_second
        # Outside of the lock: other threads take their turns while this one sleeps.
        if begin > now:
            self.sleep(begin - now)


class ThrottledFile(io.BufferedIOBase):
    """A binary file that is read no faster than a rate limiter allows."""

    def __init__(self, path: Path, limiter: RateLimiter) -> None:
        self._file, self._limiter = path.open("rb"), limiter

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, when they may be sent."""
        data = self._file.read(size)
        self._limiter.take(len(data))
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a position and return it. A request that is retried starts again at 0."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _run_in_thread(work: Callable[[], None]) -> None:
    """Do work in a daemon thread and raise what it raises."""
    # Python raises KeyboardInterrupt in the main thread only. There the client would finish every
    # file that it has begun before it stops; a daemon thread is left behind.
    outcome: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as e:
            outcome.put(e)
        else:
            outcome.put(None)

    Thread(target=run, daemon=True).start()
    if (e := outcome.get()) is not None:
        raise e
