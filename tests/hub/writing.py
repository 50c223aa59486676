"""What the stand-in does when somebody writes: repos, uploads, commits, tags."""

import base64
import hashlib
import json
from collections.abc import Mapping
from math import ceil
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.hub.handler import SIGNED, Handler, Refused
from tests.hub.repos import MAIN, Blob, Repo, is_large


class Writing(Handler):
    """The answers that change something."""

    def answer_create(self) -> None:
        self.may("write")
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        with self.hub.lock:
            if name in self.hub.repos:
                return self.json(url | {"error": "You already created this model repo"}, status=409)
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            attributes = b"".join(
                b"*%s filter=lfs diff=lfs merge=lfs -text\n" % e.encode() for e in (".gguf", ".bin")
            )
            self.hub.add(name, {".gitattributes": attributes}, "initial commit")
        return self.json(url)

    def answer_validate(self) -> None:
        parts = json.loads(self.body)["content"].split("---\n")
        try:
            fine = len(parts) >= 3 and parts[0] == "" and isinstance(yaml.safe_load(parts[1]), dict)
        except yaml.YAMLError:
            fine = False
        self.json(
            {"errors": [] if fine else [{"message": "no metadata"}], "warnings": []},
            status=200 if fine else 400,
        )

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
        self.json(
            {"transfer": "basic", "objects": [self.actions(repo, o) for o in asked["objects"]]}
        )

    def actions(self, repo: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What there is to do for one object: nothing, when it is stored."""
        digest, size = asked["oid"], asked["size"]
        if self.hub.object(digest).exists():
            return {"oid": digest, "size": size}
        place, lfs = (
            f"{self.storage}/upload/{digest}",
            f"{self.hub.url}/{repo}.git/info/lfs/objects",
        )
        upload: dict[str, Any] = {"href": f"{place}?{SIGNED}"}
        if size > self.hub.part_bytes:
            parts = range(1, ceil(size / self.hub.part_bytes) + 1)
            header = {"chunk_size": str(self.hub.part_bytes)} | {
                f"{n:05d}": f"{place}/{n}?{SIGNED}" for n in parts
            }
            upload = {"href": f"{lfs}/complete", "header": header}
        return {
            "oid": digest,
            "size": size,
            "actions": {"upload": upload, "verify": {"href": f"{lfs}/verify"}},
        }

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
            raise Refused(400, "", f"expected sha256 {asked['oid']}, found {found}")
        came.replace(self.hub.object(asked["oid"]))
        self.json({})

    def answer_commit(self, repo: str, revision: str) -> None:
        self.may("write")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            base = self.commit(repo, revision)
            if header.get("parentCommit", base.oid) != base.oid:
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for line in lines:
                self.apply(files, line["key"], line["value"])
            if "create_pr" not in self.query:
                made = self.hub.commit(repo, files, header["summary"], MAIN)
                return self.json(
                    {"commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}", "commitOid": made.oid}
                )
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
                raise Refused(
                    400, "", f"{value['path']}: the object {value['oid']} was not uploaded"
                )
            files[value["path"]] = self.hub.blob(value["path"], value["oid"], True)
        elif key == "deletedFile" and files.pop(value["path"], None) is None:
            raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")

    def answer_tag(self, repo: str, revision: str) -> None:
        self.may("write")
        commit, name = self.commit(repo, revision), f"refs/tags/{json.loads(self.body)['tag']}"
        with self.hub.lock:
            if name in self.hub.repos[repo].refs:
                raise Refused(409, "", f"Tag reference exists already: {name}")
            self.hub.repos[repo].refs[name] = commit.oid
            self.hub.save()
        self.json({})
