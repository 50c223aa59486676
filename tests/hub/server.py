"""The protocol of the stand-in: what the real client asks, and what it is told."""

import base64
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # type: ignore[import-untyped]

from tests.hub.repos import MAIN, Blob, Commit, Fault, Hub, Repo, Request, is_large

SIGNED = "X-Signature=that-lets-anybody-in"
"""What is added to an address in the storage."""
PAGE = 4
"""Entries in one page of a listing."""
STALL_SECONDS = 600
PIECE = 2**20
REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"


@contextmanager
def running(folder: Path | None = None, port: int = 0) -> Iterator[Hub]:
    """A hub that answers until the block ends; what it holds is gone then, if no folder is given."""
    with TemporaryDirectory(prefix="hub-") as own:
        hub = Hub(folder or Path(own))
        hub.load()
        handler = type("Handler", (_Handler,), {"hub": hub})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
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


class _Refused(Exception):  # noqa: N818 - it reads as what happened
    """An answer that is an error: status, code, message, and headers."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


CUED = {
    Fault.BROKEN: _Refused(500, "", "Internal error"),
    Fault.REFUSED: _Refused(403, "", "You have no permission for that"),
    Fault.BUSY: _Refused(429, "", "Too many requests", {"RateLimit": '"api";r=0;t=0'}),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[Hub]
    routes: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"/api/models/{REPO}/refs", "refs"),
        ("GET", rf"/api/models/{REPO}/discussions", "discussions"),
        ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/{REVISION}", "commit"),
        ("POST", rf"/api/models/{REPO}/tag/{REVISION}", "tag"),
        ("GET", rf"/api/(models|datasets)/{REPO}(/revision/{REVISION})?", "info"),
        ("GET", rf"/api/(models|datasets)/{REPO}/tree/{REVISION}(/(?P<folder>.+))?", "tree"),
        ("POST", rf"/api/(models|datasets)/{REPO}/paths-info/{REVISION}", "paths_info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "verify"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/complete", "complete"),
        ("HEAD|GET", rf"(/datasets)?/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
        ("GET", r"/storage/(?P<digest>[0-9a-f]{64})/(?P<path>.+)", "storage"),
        ("PUT", r"/upload/(?P<digest>[0-9a-f]{64})(/(?P<part>\d+))?", "upload"),
    )
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
            self.command, path, headers["Host"], headers["Range"], headers["Authorization"], address.query
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
        except _Refused as e:
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
        raise _Refused(404, "", "no such page")

    # Reading

    def answer_whoami(self) -> None:
        self.may("read")
        self.json({"type": "user", "name": "somebody", "orgs": []})

    def answer_info(self, repo: str, revision: str | None) -> None:
        commit = self.commit(repo, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        private = self.hub.repos[repo].private
        self.json({"id": repo, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings})

    def answer_refs(self, repo: str) -> None:
        refs = self.repo(repo).refs

        def named(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in refs.items()
                if ref.startswith(prefix)
            ]

        found = {"branches": named("refs/heads/"), "converts": [], "tags": named("refs/tags/")}
        self.json(found | ({"pullRequests": named("refs/pr/")} if "include_prs" in self.query else {}))

    def answer_discussions(self, repo: str) -> None:
        wanted = self.query.get("status", ["open"])[0]
        found = [
            {"num": n, **pull, "isPullRequest": True, "createdAt": "2026-01-01T00:00:00.000Z",
             "author": {"name": "somebody"}, "repo": {"name": repo, "type": "model"}}
            for n, pull in self.repo(repo).pulls.items() if pull["status"] == wanted
        ]  # fmt: skip
        self.json({"discussions": found, "count": len(found), "start": 0})

    def answer_tree(self, repo: str, revision: str, folder: str | None) -> None:
        files = self.commit(repo, revision).files
        prefix = f"{folder}/" if folder else ""
        inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        entries = [entry(name, blob) for name, blob in sorted(inside.items())]
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
        files = self.commit(repo, revision).files
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.json([entry(name, files[name]) for name in wanted if name in files])

    def answer_resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.commit(repo, revision)
        if path not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        self.refuse_when_planted(path)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.git}"', "Accept-Ranges": "bytes"}
        if not blob.large:
            return self.content(path, self.hub.object(blob.sha256), headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return self.send(302, b"", headers | {"Location": f"{self.storage}/storage/{blob.sha256}/{path}?{SIGNED}"})

    def answer_storage(self, digest: str, path: str) -> None:
        if not self.hub.object(digest).exists():
            raise _Refused(404, "EntryNotFound", "no such object")
        self.refuse_when_planted(f"storage/{path}")
        self.content(path, self.hub.object(digest), {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, large=True)

    # Writing

    def answer_create(self) -> None:
        self.may("write")
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        with self.hub.lock:
            if name in self.hub.repos:
                return self.json(url | {"error": "You already created this model repo"}, status=409)
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            attributes = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % e.encode() for e in (".gguf", ".bin"))
            self.hub.add(name, {".gitattributes": attributes}, "initial commit")
        return self.json(url)

    def answer_validate(self) -> None:
        parts = json.loads(self.body)["content"].split("---\n")
        try:
            fine = len(parts) >= 3 and parts[0] == "" and isinstance(yaml.safe_load(parts[1]), dict)
        except yaml.YAMLError:
            fine = False
        self.json({"errors": [] if fine else [{"message": "no metadata"}], "warnings": []}, status=200 if fine else 400)

    def answer_preupload(self, repo: str, revision: str) -> None:
        self.may("write")
        files = self.commit(repo, revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            large = is_large(asked["path"], asked["size"], base64.b64decode(asked["sample"]))
            there = files.get(asked["path"])
            oid = {"oid": there.sha256 if there.large else there.git} if there else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        self.json({"files": answers})

    def answer_batch(self, repo: str) -> None:
        self.may("write")
        self.repo(repo)
        asked = json.loads(self.body)
        self.json({"transfer": "basic", "objects": [self.actions(repo, o) for o in asked["objects"]]})

    def actions(self, repo: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What there is to do for one object: nothing, when it is stored."""
        digest, size = asked["oid"], asked["size"]
        if self.hub.object(digest).exists():
            return {"oid": digest, "size": size}
        place, lfs = f"{self.storage}/upload/{digest}", f"{self.hub.url}/{repo}.git/info/lfs/objects"
        upload: dict[str, Any] = {"href": f"{place}?{SIGNED}"}
        if size > self.hub.part_bytes:
            parts = range(1, ceil(size / self.hub.part_bytes) + 1)
            header = {"chunk_size": str(self.hub.part_bytes)} | {f"{n:05d}": f"{place}/{n}?{SIGNED}" for n in parts}
            upload = {"href": f"{lfs}/complete", "header": header}
        return {"oid": digest, "size": size, "actions": {"upload": upload, "verify": {"href": f"{lfs}/verify"}}}

    def answer_upload(self, digest: str, part: str | None) -> None:
        place = self.incoming(digest, part)
        with place.open("wb") as f:
            for piece in self.pieces():
                f.write(piece)
        self.send(200, b"", {"ETag": f'"{hashlib.md5(place.name.encode()).hexdigest()}"'})

    def answer_complete(self, repo: str) -> None:
        asked = json.loads(self.body)
        whole = self.incoming(asked["oid"])
        with whole.open("wb") as f:
            for part in asked["parts"]:
                place = self.incoming(asked["oid"], str(part["partNumber"]))
                f.write(place.read_bytes())
                place.unlink()
        self.json({})

    def answer_verify(self, repo: str) -> None:
        self.may("write")
        asked = json.loads(self.body)
        came = self.incoming(asked["oid"])
        with came.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != asked["oid"] or came.stat().st_size != asked["size"]:
            came.unlink()
            raise _Refused(400, "", f"expected sha256 {asked['oid']}, found {found}")
        came.replace(self.hub.object(asked["oid"]))
        self.json({})

    def answer_commit(self, repo: str, revision: str) -> None:
        self.may("write")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            base = self.commit(repo, revision)
            if header.get("parentCommit", base.oid) != base.oid:
                raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for line in lines:
                self.apply(files, line["key"], line["value"])
            if "create_pr" not in self.query:
                made = self.hub.commit(repo, files, header["summary"], MAIN)
                return self.json({"commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}", "commitOid": made.oid})
            number = len(self.hub.repos[repo].pulls) + 1
            self.hub.repos[repo].pulls[number] = {"title": header["summary"], "status": "open"}
            made = self.hub.commit(repo, files, header["summary"], f"refs/pr/{number}")
        urls = {"commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}", "commitOid": made.oid}
        return self.json(urls | {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"})

    def apply(self, files: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        """One line of a commit."""
        if key == "file":
            files[value["path"]] = self.hub.put(value["path"], base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.hub.object(value["oid"]).exists():
                raise _Refused(400, "", f"{value['path']}: the object {value['oid']} was not uploaded")
            files[value["path"]] = self.hub.blob(value["path"], value["oid"], True)
        elif key == "deletedFile" and files.pop(value["path"], None) is None:
            raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")

    def answer_tag(self, repo: str, revision: str) -> None:
        self.may("write")
        commit, name = self.commit(repo, revision), f"refs/tags/{json.loads(self.body)['tag']}"
        with self.hub.lock:
            if name in self.hub.repos[repo].refs:
                raise _Refused(409, "", f"Tag reference exists already: {name}")
            self.hub.repos[repo].refs[name] = commit.oid
            self.hub.save()
        self.json({})

    # What they share

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
            wrong = "Invalid credentials in Authorization header" if self.headers["Authorization"] else "Please log in"
            raise _Refused(401, "", wrong)
        if what == "write" and allowed != "write":
            raise _Refused(403, "", "Your token lacks the role that this needs: write")

    def repo(self, repo: str) -> Repo:
        """A repo that the client may see."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if repo not in self.hub.repos or (self.hub.repos[repo].private and token not in self.hub.tokens):
            raise _Refused(401, "RepoNotFound", "Repository not found")
        self.refuse_when_planted(repo)
        return self.hub.repos[repo]

    def commit(self, repo: str, revision: str) -> Commit:
        """The commit that a revision is."""
        self.repo(repo)
        found = self.hub.resolve(repo, revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def refuse_when_planted(self, path: str) -> None:
        fault = self.hub.met(path, Fault.BUSY, Fault.BROKEN, Fault.GATED)
        if fault is Fault.BUSY:
            raise _Refused(429, "", "Too many requests", {"Retry-After": "0"})
        if fault is Fault.BROKEN:
            raise _Refused(500, "", "Internal error")
        if fault is Fault.GATED:
            raise _Refused(403, "GatedRepo", "Access is restricted")

    def content(self, name: str, path: Path, headers: Mapping[str, str], large: bool = False) -> None:
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
                raise _Refused(416, "", "Requested range not satisfiable", {"Content-Range": f"bytes */{size}"})
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
        self.close_connection = self.close_connection or fault in (Fault.CUT, Fault.RESET, Fault.STALL)
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
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

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


def entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as a listing has it."""
    found: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git, "size": blob.size}
    if blob.large:
        found["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 135}
    return found
