"""Publishing, by the real client against the stand-in: one commit or none, whatever happens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.core import files
from quant.core.digest_cache import save_digests
from quant.core.errors import CheckError, InputError, QuantError, Unreachable
from quant.core.secrets import redact_urls
from quant.hub.upload import Destination
from quant.release.change import plan_change
from quant.release.folder import CHECKSUMS, digest_cache_path
from quant.release.manifest import MANIFEST
from quant.release.publish import publish_release
from tests import hub as hubs
from tests.hub import Fault, Hub
from tests.quant.conftest import TOKEN
from tests.quant.release.publishing import (
    CARD,
    CONTENT,
    REPO,
    list_commits,
    list_paths,
    publish,
    quiet_client,
    read_folder,
    read_repo,
    write_lists,
    write_release,
)

pytestmark = quiet_client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_release(tmp_path / "tiny")


def test_a_release_is_one_commit_with_a_tag_and_every_file_of_it(
    the_hub: Hub, folder: Path
) -> None:
    published = publish(folder)
    assert read_repo(the_hub) == read_folder(folder)
    assert published.fresh
    assert published.commit == the_hub.head(REPO).oid
    assert the_hub.repos[REPO].refs[f"refs/tags/{published.tag}"] == published.commit
    assert len(list_commits(the_hub)) == 1


def test_large_files_go_in_one_piece_or_in_parts_and_to_a_storage_that_sees_no_token(
    the_hub: Hub, folder: Path
) -> None:
    publish(folder)
    sent = the_hub.asked("PUT", "^/upload/")
    assert len(sent) == 1 + 3 + 3  # 800 bytes in one, 5,000 and 6,000 in parts of 2,000
    assert {r.token for r in sent} == {None}
    assert {r.token for r in the_hub.requests if r.host.startswith("127.")} >= {f"Bearer {TOKEN}"}


def test_the_same_release_again_sends_nothing_and_commits_nothing(
    the_hub: Hub, folder: Path
) -> None:
    first = publish(folder)
    the_hub.requests.clear()
    assert publish(folder) == replace(first, fresh=False)
    assert not the_hub.asked("PUT", "") and not the_hub.asked("POST", "/commit/")


def test_a_newer_release_takes_the_place_of_the_older_and_foreign_files_stay(
    the_hub: Hub, folder: Path, tmp_path: Path
) -> None:
    publish(folder)
    the_hub.commit(
        REPO,
        {**the_hub.head(REPO).files, "photo.png": the_hub.put("photo.png", b"png")},
        "A picture",
    )
    newer = {**CONTENT, "README.md": CARD + b"newer\n", "Q4_1.gguf": b"q4"}
    del newer["params"]
    planned = plan_change(write_release(tmp_path / "newer", newer), Destination(REPO))
    assert {r.path for r in planned.adds} == {"README.md", "Q4_1.gguf", CHECKSUMS, MANIFEST}
    assert planned.removes == ("params",)
    assert planned.leaves == ("photo.png",)
    publish_release(planned)
    assert read_repo(the_hub) == {**read_folder(tmp_path / "newer"), "photo.png": b"png"}
    assert len(the_hub.asked("PUT", "^/upload/")) == 7 + 1


def test_a_plan_of_a_publication_says_the_exact_change_and_does_nothing(
    the_hub: Hub, folder: Path
) -> None:
    planned = plan_change(folder, Destination(REPO, private=True))
    head, *lines = planned.lines
    assert head.startswith(f"{REPO} (to be made, private): one commit, tag release-")
    assert len(lines) == len(read_folder(folder))
    sha = hubs.sha256(CARD)
    assert f"  add    README.md  {len(CARD)} bytes  sha256 {sha}" in lines
    assert the_hub.repos == {}
    assert {r.method for r in the_hub.requests} == {"GET"}


def test_a_private_repo_is_made_private_and_a_public_one_is_not_taken_for_it(
    the_hub: Hub, folder: Path
) -> None:
    publish(folder, private=True)
    assert the_hub.repos[REPO].private
    the_hub.repos[REPO].private = False
    with pytest.raises(InputError, match="expected a private repo, found a public one"):
        publish(folder, private=True)


def test_a_pull_request_shows_nothing_until_it_is_merged(the_hub: Hub, folder: Path) -> None:
    published = publish(folder, pull_request=True)
    assert read_repo(the_hub) == {}
    assert published.pull_request == f"{the_hub.url}/{REPO}/discussions/1"
    assert published.tag is None
    assert publish(folder, pull_request=True) == replace(published, fresh=False)
    assert len(the_hub.repos[REPO].pulls) == 1
    the_hub.merge(REPO, 1)
    assert read_repo(the_hub) == read_folder(folder)
    again = publish(folder)
    assert (again.fresh, the_hub.repos[REPO].refs[f"refs/tags/{again.tag}"]) == (
        False,
        the_hub.head(REPO).oid,
    )


# Somebody else's commit


def test_a_commit_by_somebody_else_in_between_stops_with_both_names(
    the_hub: Hub, folder: Path
) -> None:
    the_hub.add(REPO, {"README.md": b"theirs"})
    planned = plan_change(folder, Destination(REPO))
    theirs = the_hub.add(REPO, {"README.md": b"theirs, newer"})
    with pytest.raises(InputError) as e:
        publish_release(planned)
    assert (
        f"expected commit {planned.head}, found {theirs}: somebody else's commit came in between"
        in str(e.value)
    )
    assert the_hub.head(REPO).oid == theirs
    with pytest.raises(InputError, match=f"expected commit {planned.head}, found {theirs}"):
        publish(folder)  # a later run does not forget what the first one began with
    published = publish(folder, parent=theirs)
    assert the_hub.repos[REPO].commits[published.commit].parent == theirs


def test_a_parent_that_is_not_the_head_is_refused_before_anything_is_sent(
    the_hub: Hub, folder: Path
) -> None:
    older = the_hub.add(REPO, {"README.md": b"older"})
    newer = the_hub.add(REPO, {"README.md": b"newer"})
    with pytest.raises(InputError, match=f"expected commit {older}, found {newer}"):
        publish(folder, parent=older)
    assert not the_hub.asked("PUT", "") and not the_hub.asked("POST", "")


def test_a_tag_that_is_taken_is_not_moved(the_hub: Hub, folder: Path) -> None:
    first = the_hub.add(REPO, {"README.md": b"theirs"})
    the_hub.repos[REPO].refs["refs/tags/v1"] = first
    with pytest.raises(
        InputError, match=f"tag v1: expected a name that is free, found it at {first}"
    ):
        publish(folder, tag="v1")
    assert not the_hub.asked("POST", "")


# Known digests


def test_nothing_is_read_to_be_hashed_again(
    the_hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_digests(
        {p: hubs.sha256(p.read_bytes()) for p in folder.rglob("*") if p.is_file()},
        digest_cache_path(folder),
    )
    read: list[str] = []
    digest = files.hash_file

    def counting(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(files, "hash_file", counting)
    monkeypatch.setattr(
        "huggingface_hub.lfs.sha_fileobj", lambda f: pytest.fail(f"{f.name} was hashed")
    )
    publish(folder)
    assert sorted(read) == [CHECKSUMS, MANIFEST]


def test_shards_of_fifty_gigabytes_that_are_there_already_cost_a_moment(
    the_hub: Hub, folder: Path
) -> None:
    shards = {f"BF16/tiny-BF16-{n:05d}-of-00003.gguf": f"{n}" * 64 for n in (1, 2, 3)}
    for name, sha in shards.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("wb") as f:
            f.truncate(49_990_000_000)
        the_hub.hold(sha, 49_990_000_000)
    sums = {name: hubs.sha256(data) for name, data in CONTENT.items()} | shards
    write_lists(folder, sums)
    save_digests({folder / name: sha for name, sha in sums.items()}, digest_cache_path(folder))
    assert publish(folder).fresh
    sizes = [b.size for n, b in the_hub.head(REPO).files.items() if n.startswith("BF16/")]
    assert sizes == [49_990_000_000] * 3


# What is refused


@pytest.mark.parametrize("repo", ["", "tiny", "a/b/c", "../x", "-rf/x", "a/" + "b" * 300])
def test_a_repo_id_that_is_none_is_refused_before_any_request(
    the_hub: Hub, folder: Path, repo: str
) -> None:
    with pytest.raises(InputError, match="repo: expected OWNER/NAME, found"):
        plan_change(folder, Destination(repo))
    assert the_hub.requests == []


def test_a_missing_token_is_told_before_any_request(
    the_hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        InputError, match=r"HF_TOKEN: not set; publishing needs a token that may write to"
    ):
        publish(folder)
    assert the_hub.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_SomebodyElsesTokenXYZ", "HF_TOKEN: the hub does not know this token"),
        ("hf_OneThatMayOnlyReadXY", f"{REPO}: this token may not do that (403: "),
        (
            "hf_With A Blank In Itsss",
            "HF_TOKEN: expected a token of the hub, found something with blanks",
        ),
        (
            "hf_WithA\nLineInItXXXXXX",
            "HF_TOKEN: expected a token of the hub, found something with blanks",
        ),
    ],
)
def test_a_wrong_token_is_one_line_that_does_not_tell_it(
    the_hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str, message: str
) -> None:
    the_hub.tokens["hf_OneThatMayOnlyReadXY"] = "read"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError) as e:
        publish(folder)
    assert message in str(e.value)
    assert token not in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_gated_repo_is_told_with_the_page_to_visit(the_hub: Hub, folder: Path) -> None:
    the_hub.add(REPO, {"README.md": b"x"})
    the_hub.plant(REPO, Fault.GATED)
    with pytest.raises(InputError, match=f"see https://huggingface.co/{REPO}, and set HF_TOKEN"):
        publish(folder)


@pytest.mark.parametrize("name", ["", " ", "unknown"])
def test_a_release_without_a_license_is_not_published(
    the_hub: Hub, tmp_path: Path, name: str
) -> None:
    folder = write_release(tmp_path / "tiny", license_name=name)
    with pytest.raises(InputError, match=r"recipe\.card\.license: expected a license, found"):
        publish(folder)
    assert the_hub.requests == []


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_a_file_that_was_changed_by_hand_is_named(the_hub: Hub, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"changed")
    with pytest.raises(CheckError, match=f"{name}: was changed since it was made: expected sha256"):
        publish(folder)
    assert the_hub.requests == []


def test_files_that_are_missing_or_too_many_are_named(the_hub: Hub, folder: Path) -> None:
    (folder / "params").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckError) as e:
        publish(folder)
    assert [p.rpartition("/")[2].split(";")[0] for p in e.value.problems] == [
        "params: missing",
        "notes.txt: not of this release",
    ]


def test_a_remote_file_that_differs_is_named_with_both_digests(the_hub: Hub, folder: Path) -> None:
    planned = plan_change(folder, Destination(REPO))
    commit = Hub.commit

    def bent(self: Hub, repo: str, blobs: Any, *args: Any) -> Any:
        bad = {
            n: the_hub.put(n, b"bent" * 200) if n.endswith("TQ1_0.gguf") else b
            for n, b in blobs.items()
        }
        return commit(self, repo, bad, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hub, "commit", bent)
        with pytest.raises(CheckError) as e:
            publish_release(planned)
    (message,) = e.value.problems
    expected, actual = hubs.sha256(CONTENT["tiny-UD-TQ1_0.gguf"]), hubs.sha256(b"bent" * 200)
    assert (
        message
        == f"{REPO}: tiny-UD-TQ1_0.gguf: expected sha256 {expected} (800 bytes), found sha256 {actual} (800 bytes)"
    )


def test_a_hub_without_room_is_told_as_that(the_hub: Hub, folder: Path) -> None:
    from tests.hub.handler import Refused

    with pytest.MonkeyPatch.context() as patch:
        full = Refused(
            403, "", "Private repository storage limit reached, please upgrade your plan"
        )
        patch.setattr(
            "tests.hub.writing.Writing.answer_batch", lambda *_, **__: (_ for _ in ()).throw(full)
        )
        with pytest.raises(InputError, match=f"{REPO}: no space left on the hub"):
            publish(folder)


def test_a_hub_that_is_not_there_is_one_line(
    the_hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(QuantError) as e:
        publish(folder)
    assert isinstance(e.value, Unreachable)
    assert len(str(e.value).splitlines()) == 1


def test_what_the_client_logs_holds_no_token_and_no_signature(
    the_hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    upload = next(
        n for n, path in enumerate(list_paths(the_hub, folder)) if path.startswith("/upload/")
    )
    the_hub.cues = {upload: Fault.BROKEN}
    publish(folder)
    message = caplog.text + "".join(capfd.readouterr())
    assert "thrown while requesting PUT" in message
    assert TOKEN not in message and hubs.SIGNED not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"Bearer {TOKEN}", "Bearer …"),
        ("Bearer hf_AnotherTokenOfSomebody", "Bearer hf_…"),
        (
            "PUT https://x.example/a/b?X-Amz-Signature=1&y=2 failed",
            "PUT https://x.example/a/b failed",
        ),
        ("where? here", "where? here"),
    ],
)
def test_secrets_are_taken_out_of_a_text(the_hub: Hub, text: str, message: str) -> None:
    assert redact_urls(text) == message


def test_a_publication_that_is_done_leaves_no_record_beside_the_release(
    the_hub: Hub, folder: Path
) -> None:
    publish(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny", "tiny.digests.json"]
    assert TOKEN not in (folder.parent / "tiny.digests.json").read_text()
    assert json.loads((folder.parent / "tiny.digests.json").read_text())


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "null"])
def test_a_record_of_an_earlier_publication_that_cannot_be_read_is_none(
    the_hub: Hub, folder: Path, text: str
) -> None:
    folder.with_name("tiny.publishing.json").write_text(text)
    assert publish(folder).fresh
