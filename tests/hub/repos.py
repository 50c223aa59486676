"""What the stand-in holds: repos with their commits and refs, the objects that they name, and what is to go wrong."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from pathlib import Path

LARGE = (".safetensors", ".gguf", ".bin", ".pt")
"""Endings that the hub stores as large files; of the others, those that are binary or longer than LARGE_BYTES."""
LARGE_BYTES = 10 * 10**6
MAIN = "refs/heads/main"
STATE = "hub.json"


class Fault(Enum):
    """What can go wrong with a file, or with a request."""

    CUT = auto()
    """The body ends early, and the connection with it."""
    RESET = auto()
    """The connection is reset in the middle of the body."""
    STALL = auto()
    """Half of the body comes, and then nothing."""
    WRONG = auto()
    """Other bytes, as many."""
    HTML = auto()
    """A page of a captive portal."""
    BUSY = auto()
    """429, with the time to wait."""
    BROKEN = auto()
    """500."""
    GATED = auto()
    """403: the repo's owners ask for something first."""
    REFUSED = auto()
    """403: the token may not do this."""
    DROPPED = auto()
    """The connection ends before anything was done."""
    LOST = auto()
    """It is done, and the connection ends before the answer."""


@dataclass(frozen=True)
class Request:
    """One request that came in."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    query: str = ""


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    sha256: str
    git: str
    size: int
    large: bool


@dataclass(frozen=True)
class Commit:
    """Everything that a repo holds at one time."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repo: its commits in their order, and what points to them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """refs/heads/main, refs/tags/NAME, refs/pr/NUMBER → commit."""
    pulls: dict[int, dict[str, str]] = field(default_factory=dict)
    """Number of a pull request → its title and status."""


@dataclass
class Hub:
    """The repos that are there, what is wrong with them, and what was asked of them."""

    folder: Path
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    """Token → ``write`` or ``read``; when there is none, anybody may do anything."""
    faults: dict[str, tuple[Fault, int]] = field(default_factory=dict)
    """Path, ``storage/`` and path, or repo → the fault, and how many times it will show."""
    cues: dict[int, Fault | Callable[[], None]] = field(default_factory=dict)
    """Number of a request, from 0 → what happens to it instead; a function is called before it is answered."""
    bytes_per_second: int | None = None
    """How fast large files come; as fast as they can when not given."""
    part_bytes: int = 5 * 10**9
    """Uploads that are longer come in parts of this size."""
    requests: list[Request] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, repo: str, files: Mapping[str, bytes], title: str = "Add files") -> str:
        """Let a repo hold these files and no others, by a commit on its main branch, and say the commit."""
        blobs = {name: self.put(name, data) for name, data in files.items()}
        return self.commit(repo, blobs, title).oid

    def commit(
        self, repo: str, files: Mapping[str, Blob], title: str, ref: str = MAIN, onto: str = MAIN
    ) -> Commit:
        """A commit with these files at a ref, whose parent is what ``onto`` is now."""
        with self.lock:
            there = self.repos.setdefault(repo, Repo())
            parent = there.refs.get(onto)
            listing = "".join(f"{name} {blob.sha256}\n" for name, blob in sorted(files.items()))
            oid = hashlib.sha1(f"{repo} {parent} {title}\n{listing}".encode()).hexdigest()
            there.commits[oid] = Commit(oid, parent, title, dict(files))
            there.refs[ref] = oid
            self.save()
            return there.commits[oid]

    def head(self, repo: str) -> Commit:
        """What the main branch of a repo is."""
        return self.repos[repo].commits[self.repos[repo].refs[MAIN]]

    def resolve(self, repo: str, revision: str) -> Commit | None:
        """The commit that a branch, tag, pull request or commit stands for."""
        there = self.repos[repo]
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        oid = next((there.refs[name] for name in names if name in there.refs), revision)
        return there.commits.get(oid)

    def merge(self, repo: str, number: int) -> Commit:
        """Merge a pull request, as its owners would."""
        with self.lock:
            there = self.repos[repo]
            there.pulls[number]["status"] = "merged"
            return self.commit(
                repo, there.commits[there.refs[f"refs/pr/{number}"]].files, f"Merge #{number}"
            )

    def put(self, name: str, data: bytes) -> Blob:
        """Store the bytes of a file."""
        self.object(sha256(data)).write_bytes(data)
        return self.blob(name, sha256(data), is_large(name, len(data), data[:512]))

    def hold(self, digest: str, size: int) -> None:
        """Claim to hold an object of that digest: a sparse file, so that its bytes are zeros."""
        with self.object(digest).open("wb") as f:
            f.truncate(size)

    def blob(self, name: str, digest: str, large: bool) -> Blob:
        """A stored object as a file of a commit."""
        path = self.object(digest)
        size = path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
        return Blob(digest, git_digest(pointer if large else path.read_bytes()), size, large)

    def object(self, digest: str) -> Path:
        """Where the bytes of that digest lie."""
        path = self.folder / "objects" / digest
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def plant(self, path: str, fault: Fault, times: int = 1_000_000) -> None:
        """Let a file go wrong, a number of times."""
        self.faults[path] = (fault, times)

    def met(self, path: str, *kinds: Fault) -> Fault | None:
        """The fault of that path, if it is one of these kinds and still shows."""
        with self.lock:
            fault, times = self.faults.get(path, (None, 0))
            if fault is None or times == 0 or fault not in kinds:
                return None
            self.faults[path] = (fault, times - 1)
            return fault

    def gets(self, ending: str = "") -> list[Request]:
        """The requests for bytes of files, in the order in which they came."""
        return [
            r
            for r in self.requests
            if r.method == "GET" and r.path.endswith(ending) and "/api/" not in r.path
        ]

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests of a method whose path fits a pattern."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def save(self) -> None:
        """Write down what there is, so that a hub that is started again on the folder has it."""
        path = self.folder / STATE
        path.with_suffix(".new").write_text(
            json.dumps({name: asdict(repo) for name, repo in self.repos.items()})
        )
        path.with_suffix(".new").replace(path)

    def load(self) -> None:
        """Take up what an earlier hub left in the folder."""
        if not (self.folder / STATE).exists():
            return
        for name, repo in json.loads((self.folder / STATE).read_text()).items():
            commits = {
                oid: Commit(
                    oid, c["parent"], c["title"], {p: Blob(**b) for p, b in c["files"].items()}
                )
                for oid, c in repo["commits"].items()
            }
            pulls = {int(n): pull for n, pull in repo["pulls"].items()}
            self.repos[name] = Repo(repo["private"], commits, repo["refs"], pulls)


def is_large(name: str, size: int, sample: bytes) -> bool:
    """Whether the hub keeps a file out of the git repo."""
    return size > 0 and (name.endswith(LARGE) or size > LARGE_BYTES or b"\0" in sample)


def sha256(data: bytes) -> str:
    """The digest by which a large file is known."""
    return hashlib.sha256(data).hexdigest()


def git_digest(data: bytes) -> str:
    """The digest by which git knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
