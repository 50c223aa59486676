"""The protocol of the stand-in: what the real client asks, and what it is told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from tests.hub.handler import PAGE, REPO, REVISION, SIGNED, Refused
from tests.hub.repos import Blob, Hub
from tests.hub.writing import Writing


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


class _Handler(Writing):
    """All answers; those that only tell are here."""

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

    def answer_whoami(self) -> None:
        self.may("read")
        self.json({"type": "user", "name": "somebody", "orgs": []})

    def answer_info(self, repo: str, revision: str | None) -> None:
        commit = self.commit(repo, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        private = self.hub.repos[repo].private
        self.json(
            {"id": repo, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings}
        )

    def answer_refs(self, repo: str) -> None:
        refs = self.repo(repo).refs

        def named(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in refs.items()
                if ref.startswith(prefix)
            ]

        found = {"branches": named("refs/heads/"), "converts": [], "tags": named("refs/tags/")}
        self.json(
            found | ({"pullRequests": named("refs/pr/")} if "include_prs" in self.query else {})
        )

    def answer_discussions(self, repo: str) -> None:
        wanted = self.query.get("status", ["open"])[0]
        found = [
            {
                "num": n,
                **pull,
                "isPullRequest": True,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "author": {"name": "somebody"},
                "repo": {"name": repo, "type": "model"},
            }
            for n, pull in self.repo(repo).pulls.items()
            if pull["status"] == wanted
        ]
        self.json({"discussions": found, "count": len(found), "start": 0})

    def answer_tree(self, repo: str, revision: str, folder: str | None) -> None:
        files = self.commit(repo, revision).files
        prefix = f"{folder}/" if folder else ""
        inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        entries = [entry(name, blob) for name, blob in sorted(inside.items())]
        if self.query.get("recursive", ["false"])[0].lower() not in ("1", "true"):
            below = {
                prefix + name.removeprefix(prefix).split("/")[0]
                for name in inside
                if "/" in name[len(prefix) :]
            }
            entries = [e for e in entries if "/" not in e["path"][len(prefix) :]]
            entries += [
                {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
                for name in sorted(below)
            ]
        begin = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if begin + PAGE < len(entries):
            kept = "".join(
                f"&{key}={self.query[key][0]}"
                for key in ("recursive", "expand")
                if key in self.query
            )
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
            raise Refused(404, "EntryNotFound", "Entry not found")
        self.refuse_when_planted(path)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.git}"', "Accept-Ranges": "bytes"}
        if not blob.large:
            return self.content(path, self.hub.object(blob.sha256), headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return self.send(
            302,
            b"",
            headers | {"Location": f"{self.storage}/storage/{blob.sha256}/{path}?{SIGNED}"},
        )

    def answer_storage(self, digest: str, path: str) -> None:
        if not self.hub.object(digest).exists():
            raise Refused(404, "EntryNotFound", "no such object")
        self.refuse_when_planted(f"storage/{path}")
        self.content(
            path,
            self.hub.object(digest),
            {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"},
            large=True,
        )


def entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as a listing has it."""
    found: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git, "size": blob.size}
    if blob.large:
        found["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 135}
    return found
