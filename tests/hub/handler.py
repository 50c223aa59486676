"""What every answer of the stand-in needs: finding who answers, reading bodies, sending files, and the faults on cue."""

import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repos import Commit, Fault, Hub, Repo, Request

SIGNED = "X-Signature=that-lets-anybody-in"
"""What is added to an address in the storage."""
PAGE = 4
"""Entries in one page of a listing."""
STALL_SECONDS = 600
PIECE = 2**20
REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"


class Refused(Exception):  # noqa: N818 - it reads as what happened
    """An answer that is an error: status, code, message, and headers."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {
            "X-Error-Message": message,
            **({"X-Error-Code": code} if code else {}),
            **(headers or {}),
        }


CUED = {
    Fault.BROKEN: Refused(500, "", "Internal error"),
    Fault.REFUSED: Refused(403, "", "You have no permission for that"),
    Fault.BUSY: Refused(429, "", "Too many requests", {"RateLimit": '"api";r=0;t=0'}),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[Hub]
    routes: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    """Method, path, and the name of what answers; the groups of the path are its arguments."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client went away, or a fault threw it out
            self.close_connection = True

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        path, headers = unquote(address.path), self.headers
        request = Request(
            self.command,
            path,
            headers["Host"],
            headers["Range"],
            headers["Authorization"],
            address.query,
        )
        with self.hub.lock:
            cue = self.hub.cues.get(len(self.hub.requests))
            self.hub.requests.append(request)
        self.is_lost = cue is Fault.LOST
        if callable(cue):
            cue()
        if cue is Fault.DROPPED:
            self.close_connection = True
            return
        try:
            if isinstance(cue, Fault) and cue in CUED:
                self.drain()
                raise CUED[cue]
            self.answer(path)
        except Refused as e:
            self.send(e.status, json.dumps({"error": str(e)}).encode(), e.headers)

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815
    do_PUT = do_GET  # noqa: N815

    def answer(self, path: str) -> None:
        """Find who answers, and let it."""
        if self.command != "PUT":
            self.body = b"".join(self.pieces())
        for methods, pattern, name in self.routes:
            if re.fullmatch(methods, self.command) and (match := re.fullmatch(pattern, path)):
                return getattr(self, f"answer_{name}")(**match.groupdict())  # type: ignore[no-any-return]
        raise Refused(404, "", "no such page")

    @property
    def storage(self) -> str:
        """Where large files lie: another host, for all that the client knows."""
        return self.hub.url.replace("127.0.0.1", "localhost")

    def incoming(self, digest: str, part: str | None = None) -> Path:
        """Where an object lies until it was verified, or a part of it."""
        path = self.hub.folder / "incoming" / (f"{digest}.{part}" if part else digest)
        path.parent.mkdir(exist_ok=True)
        return path

    def may(self, what: str) -> None:
        """Refuse a token that may not do that."""
        if not self.hub.tokens:
            return
        allowed = self.hub.tokens.get((self.headers["Authorization"] or "").removeprefix("Bearer "))
        if allowed is None:
            wrong = (
                "Invalid credentials in Authorization header"
                if self.headers["Authorization"]
                else "Please log in"
            )
            raise Refused(401, "", wrong)
        if what == "write" and allowed != "write":
            raise Refused(403, "", "Your token lacks the role that this needs: write")

    def repo(self, repo: str) -> Repo:
        """A repo that the client may see."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if repo not in self.hub.repos or (
            self.hub.repos[repo].private and token not in self.hub.tokens
        ):
            raise Refused(401, "RepoNotFound", "Repository not found")
        self.refuse_when_planted(repo)
        return self.hub.repos[repo]

    def commit(self, repo: str, revision: str) -> Commit:
        """The commit that a revision is."""
        self.repo(repo)
        found = self.hub.resolve(repo, revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def refuse_when_planted(self, path: str) -> None:
        fault = self.hub.met(path, Fault.BUSY, Fault.BROKEN, Fault.GATED)
        if fault is Fault.BUSY:
            raise Refused(429, "", "Too many requests", {"Retry-After": "0"})
        if fault is Fault.BROKEN:
            raise Refused(500, "", "Internal error")
        if fault is Fault.GATED:
            raise Refused(403, "GatedRepo", "Access is restricted")

    def content(
        self, name: str, path: Path, headers: Mapping[str, str], large: bool = False
    ) -> None:
        """The bytes of a file, or of a part of it; this is where most faults show."""
        kinds = (Fault.CUT, Fault.RESET, Fault.STALL, Fault.WRONG, Fault.HTML)
        fault = self.hub.met(name, *kinds) if self.command == "GET" else None
        if fault is Fault.HTML:
            return self.send(200, b"<html><body>Please log in to this network.</body></html>", {})
        size, begin, status, headers = path.stat().st_size, 0, 200, dict(headers)
        end = size
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            begin, end, status = int(asked[1]), min(int(asked[2] or size - 1) + 1, size), 206
            if begin >= size:
                raise Refused(
                    416, "", "Requested range not satisfiable", {"Content-Range": f"bytes */{size}"}
                )
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        stop = (end - begin) // 2 if fault in (Fault.CUT, Fault.RESET, Fault.STALL) else None
        with path.open("rb") as f:
            f.seek(begin)
            self.send_file(status, f, end - begin, headers, large, stop, flip=fault is Fault.WRONG)
        if fault is Fault.STALL:
            self.wfile.flush()
            self.connection.settimeout(STALL_SECONDS)
            self.connection.recv(1)  # until the client gives up
        if fault is Fault.RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once: an orderly end would send a FIN first
        self.close_connection = self.close_connection or fault in (
            Fault.CUT,
            Fault.RESET,
            Fault.STALL,
        )
        return None

    def pieces(self) -> Iterator[bytes]:
        """The body of the request, as it comes."""
        if "chunked" in (self.headers["Transfer-Encoding"] or ""):
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers["Content-Length"] or 0)
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read the body of a request that is refused, so that the next one can be read."""
        for _ in self.pieces():
            pass

    def json(self, value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        self.send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """A short answer."""
        if self.is_lost:
            self.close_connection = True
            return
        self.begin(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(
        self,
        status: int,
        f: BinaryIO,
        length: int,
        headers: Mapping[str, str],
        large: bool,
        stop: int | None,
        flip: bool,
    ) -> None:
        """The next ``length`` bytes of a file; ``stop`` says after how many to give up."""
        if self.is_lost:
            self.close_connection = True
            return
        self.begin(status, length, headers)
        left = 0 if self.command == "HEAD" else length if stop is None else stop
        pace = self.hub.bytes_per_second if large else None
        while left:
            piece = f.read(min(left, max(pace // 20, 1) if pace else PIECE))
            left -= len(piece)
            self.wfile.write(bytes(byte ^ 0xFF for byte in piece) if flip else piece)
            if pace:
                time.sleep(0.05)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Say nothing."""
