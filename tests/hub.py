"""A stand-in for the Hugging Face hub on loopback: what the real client needs to read from it, and faults on demand.

Large files are stored as the hub stores them: the repo answers with a redirect to another host, here ``localhost`` where
the repo itself is on ``127.0.0.1``, so that a token which is sent on to the storage shows.
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin", ".pt")
"""Endings that the hub stores as large files; all others are part of the git repo."""
SIGNED = "X-Signature=that-lets-anybody-in"
"""What is added to an address in the storage."""
PAGE = 4
"""Entries in one page of a listing."""


class Fault(Enum):
    """What can go wrong with a file."""

    CUT = auto()
    """The body ends early, and the connection with it."""
    RESET = auto()
    """The connection is reset in the middle of the body."""
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


@dataclass(frozen=True)
class Request:
    """One request that came in."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """The repos that are there, what is wrong with them, and what was asked of them."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Repo → commit → path → bytes."""
    faults: dict[str, tuple[Fault, int]] = field(default_factory=dict)
    """Path, ``storage/`` and path, or repo → the fault, and how many times it will show."""
    bytes_per_second: int | None = None
    """How fast large files come; as fast as they can when not given."""
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repo: str, files: Mapping[str, bytes]) -> str:
        """Commit these files to a repo, and say the commit."""
        listing = "".join(f"{name} {sha256(data)}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        return commit

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
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(ending) and "/api/" not in r.path]


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sha256(data: bytes) -> str:
    """The digest by which a large file is known."""
    return hashlib.sha256(data).hexdigest()


def git_digest(data: bytes) -> str:
    """The digest by which git knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Refused(Exception):  # noqa: N818 - it reads as what happened
    """An answer that is an error: status, code, message, and headers."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]
    routes: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/storage/(?P<digest>[0-9a-f]{64})/(?P<path>.+)", "storage"),
    )
    """Method, path, and the name of what answers; the groups of the path are its arguments."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client went away, or a fault threw it out
            self.close_connection = True

    def do_GET(self) -> None:
        self.query = parse_qs(urlsplit(self.path).query)
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        request = Request(self.command, path, headers["Host"], headers["Range"], headers["Authorization"])
        with self.hub.lock:
            self.hub.requests.append(request)
        self.body = self.rfile.read(int(headers["Content-Length"] or 0))
        for methods, pattern, name in self.routes:
            if re.fullmatch(methods, self.command) and (match := re.fullmatch(pattern, path)):
                try:
                    return getattr(self, f"answer_{name}")(**match.groupdict())  # type: ignore[no-any-return]
                except _Refused as e:
                    return self.send(e.status, json.dumps({"error": str(e)}).encode(), e.headers)
        return self.send(404, b"no such page", {})

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815

    def answer_info(self, repo: str, revision: str | None) -> None:
        commit, files = self.files(repo, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(files)]
        self.json({"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def answer_tree(self, repo: str, revision: str, folder: str | None) -> None:
        _, files = self.files(repo, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {name: data for name, data in files.items() if name.startswith(prefix)}
        entries = [self.entry(name, data) for name, data in sorted(inside.items())]
        if self.query.get("recursive", ["false"])[0].lower() not in ("1", "true"):
            below = {prefix + name.removeprefix(prefix).split("/")[0] for name in inside if "/" in name[len(prefix) :]}
            entries = [e for e in entries if "/" not in e["path"][len(prefix) :]]
            entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(below)]
        begin = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if begin + PAGE < len(entries):
            kept = "".join(f"&{key}={self.query[key][0]}" for key in ("recursive", "expand") if key in self.query)
            page = f"{self.hub.url}{urlsplit(self.path).path}?cursor={begin + PAGE}{kept}"
            headers["Link"] = f'<{page}>; rel="next"'
        self.json(entries[begin : begin + PAGE], headers)

    def answer_paths_info(self, repo: str, revision: str) -> None:
        _, files = self.files(repo, revision)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.json([self.entry(name, files[name]) for name in wanted if name in files])

    def answer_resolve(self, repo: str, revision: str, path: str) -> None:
        commit, files = self.files(repo, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        self.refuse_when_planted(path)
        data = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_digest(data)}"', "Accept-Ranges": "bytes"}
        if not path.endswith(LARGE):
            return self.content(path, data, headers)
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        storage = self.hub.url.replace("127.0.0.1", "localhost")
        return self.send(302, b"", headers | {"Location": f"{storage}/storage/{sha256(data)}/{path}?{SIGNED}"})

    def answer_storage(self, digest: str, path: str) -> None:
        known = (data for commits in self.hub.repos.values() for files in commits.values() for data in files.values())
        data = next((data for data in known if sha256(data) == digest), None)
        if data is None:
            raise _Refused(404, "EntryNotFound", "no such object")
        self.refuse_when_planted(f"storage/{path}")
        self.content(path, data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit that a revision is, and its files."""
        commits = self.hub.repos.get(repo)
        if commits is None:
            raise _Refused(401, "RepoNotFound", "Repository not found")
        self.refuse_when_planted(repo)
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, commits[commit]

    def refuse_when_planted(self, path: str) -> None:
        fault = self.hub.met(path, Fault.BUSY, Fault.BROKEN, Fault.GATED)
        if fault is Fault.BUSY:
            raise _Refused(429, "", "Too many requests", {"Retry-After": "0"})
        if fault is Fault.BROKEN:
            raise _Refused(500, "", "Internal error")
        if fault is Fault.GATED:
            raise _Refused(403, "GatedRepo", "Access is restricted")

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        """A file as a listing has it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": git_digest(data), "size": len(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 135}
        return entry

    def content(self, path: str, data: bytes, headers: Mapping[str, str]) -> None:
        """The bytes of a file, or of a part of it; this is where most faults show."""
        fault = self.command == "GET" and self.hub.met(path, Fault.CUT, Fault.RESET, Fault.WRONG, Fault.HTML)
        if fault is Fault.HTML:
            return self.send(200, b"<html><body>Please log in to this network.</body></html>", {})
        if fault is Fault.WRONG:
            data = bytes(byte ^ 0xFF for byte in data)
        begin, status, headers = 0, 200, dict(headers)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            begin, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:]
        if fault not in (Fault.CUT, Fault.RESET):
            return self.send(status, body, headers, self.hub.bytes_per_second if path.endswith(LARGE) else None)
        self.send(status, body, headers, stop=len(body) // 2)
        if fault is Fault.RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once: an orderly end would send a FIN first
        self.close_connection = True
        return None

    def json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        bytes_per_second: int | None = None,
        stop: int | None = None,
    ) -> None:
        """An answer; ``stop`` says after how many bytes of the body to give up."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        step = max(bytes_per_second // 20, 1) if bytes_per_second else len(body) or 1
        body = body[:stop]
        for begin in range(0, len(body), step):
            self.wfile.write(body[begin : begin + step])
            if bytes_per_second:
                time.sleep(0.05)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Say nothing."""
