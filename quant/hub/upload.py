"""Send files to the hub's storage, where nobody sees them until a commit names them; as fast as it is allowed.

What the storage holds already is not sent again, so sending early (each variant as soon as it talks) and sending at the end
are the same work.
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


@dataclass(frozen=True)
class Destination:
    """Where a release is to be published, and how."""

    repo: str
    private: bool = False
    """Of a repo that is made for it."""
    pull_request: bool = False
    """Propose it, and let the repo's owners merge it."""
    tag: str | None = None
    """release-<begin of the manifest's digest> when not given."""
    parent: str | None = None
    """The commit that it has to follow; what the repo is at now, when not given."""
    uploads: int = 4
    """Files that are sent at the same time."""
    limit: int | None = None
    """Bytes a second that sending may take, all files together."""


if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


@dataclass(frozen=True)
class Upload:
    """What the hub's storage holds now."""

    repo: str
    files: int
    bytes: int


def upload_variant(
    placed: Mapping[str, Path], receipts: Iterable[Receipt], target: "Destination"
) -> Upload:
    """Let the hub's storage hold these files of a release that is not published yet; the repo is made if there is none.

    Raises InputError for a refusal, Unreachable when the hub does not answer; the same call continues.
    """
    whole = {name: (path, r) for (name, path), r in zip(placed.items(), receipts, strict=True)}
    with (
        hub_client.convert_errors(target.repo),
        prepare_additions({n: (p, r.sha256) for n, (p, r) in whole.items()}, target.limit) as adds,
    ):
        api = hub_client.make_client()
        hub_client.retry(
            lambda: api.create_repo(target.repo, private=target.private, exist_ok=True)
        )
        upload_files(api, adds, target)
    return Upload(target.repo, len(whole), sum(r.bytes for _, r in whole.values()))


def upload_files(api: "HfApi", adds: "list[CommitOperationAdd]", target: "Destination") -> None:
    """Send what the storage lacks of these files."""
    _beside(
        lambda: api.preupload_lfs_files(
            target.repo,
            adds,
            num_threads=target.uploads,
            create_pr=target.pull_request,
            free_memory=False,
        )
    )


@contextmanager
def prepare_additions(
    files: Mapping[str, tuple[Path, str]], limit: int | None
) -> "Iterator[list[CommitOperationAdd]]":
    """Files, by their names in the repo, with their digests, as the hub's client takes them, while the block runs."""
    from huggingface_hub import CommitOperationAdd

    limiter = RateLimiter(limit) if limit else None
    with ExitStack() as opened:
        made = []
        for name, (path, sha256) in files.items():
            add = CommitOperationAdd(name, path)
            add.upload_info.sha256 = bytes.fromhex(
                sha256
            )  # known: the client would read the whole file for it
            if limiter:
                # The client sends what it has to read itself by HTTP, and not by Xet, whose speed nobody can hold.
                add.path_or_fileobj = opened.enter_context(ThrottledFile(path, limiter))  # type: ignore[assignment]  # it is one
            made.append(add)
        yield made


@dataclass
class RateLimiter:
    """Lets so many bytes pass in a second, however many threads send them."""

    bytes_per_second: int
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = lambda seconds: time.sleep(seconds)
    free_at: float = 0.0
    """When all that passed before is paid for."""
    lock: Lock = field(default_factory=Lock)

    def take(self, count: int) -> None:
        """Wait until bytes may pass."""
        with self.lock:
            now = self.clock()
            begin = max(now, self.free_at)
            self.free_at = begin + count / self.bytes_per_second
        if begin > now:
            self.sleep(begin - now)


class ThrottledFile(io.BufferedIOBase):
    """A file that can be read as fast as the limiter lets it."""

    def __init__(self, path: Path, limiter: RateLimiter) -> None:
        self._file, self._limiter = path.open("rb"), limiter

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, when they may pass."""
        data = self._file.read(size)
        self._limiter.take(len(data))
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As of a file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of a file."""
        return self._file.tell()

    def readable(self) -> bool:
        """It can be."""
        return True

    def seekable(self) -> bool:
        """A request that failed is begun anew."""
        return True

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        super().close()


def _beside(work: Callable[[], None]) -> None:
    """Do the work in a thread that may be left behind: interrupted in this one, the client would end every file first."""
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as e:
            ended.put(e)
        else:
            ended.put(None)

    Thread(target=run, daemon=True).start()
    if (e := ended.get()) is not None:
        raise e
