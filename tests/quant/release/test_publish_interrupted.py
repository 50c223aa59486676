"""A publication interrupted at each request: nobody sees half, and one commit is made."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from quant.core.errors import InputError, Unreachable
from quant.hub.upload import Destination
from quant.release.change import plan_change
from tests.hub import Fault, Hub
from tests.quant.conftest import TOKEN
from tests.quant.release.publisher import Publisher, serve
from tests.quant.release.publishing import (
    REPO,
    SMALL,
    count_requests,
    list_commits,
    list_paths,
    publish,
    quiet_client,
    read_folder,
    read_repo,
    reset,
    write_release,
)

pytestmark = [quiet_client, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_release(tmp_path / "tiny", SMALL)


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    with serve() as process:
        yield process


@pytest.fixture
def publisher(server: "subprocess.Popen[str]", the_hub: Hub, folder: Path) -> Publisher:
    return Publisher(server, the_hub, folder)


@pytest.mark.parametrize(
    "fault", [Fault.REFUSED, Fault.BROKEN, Fault.BUSY, Fault.DROPPED, Fault.LOST]
)
@pytest.mark.parametrize("pull_request", [False, True], ids=["commit", "pull request"])
def test_whichever_request_fails_nobody_sees_half_and_one_commit_is_made(
    the_hub: Hub, folder: Path, fault: Fault, pull_request: bool
) -> None:
    release = read_folder(folder)
    count = count_requests(the_hub, folder, pull_request=pull_request)
    assert count > 15
    for k in range(count):
        the_hub.cues = {k: fault}
        succeeded = False
        try:
            publish(folder, pull_request=pull_request)
            succeeded = True
            assert fault is not Fault.REFUSED
        except InputError as e:
            assert fault is Fault.REFUSED
            assert len(e.problems) == 1
            refused, *later = ((r.method, r.path, r.query) for r in the_hub.requests[k:])
            of_each_file = refused[1].endswith(("/verify", "/complete"))
            assert refused not in later or of_each_file, "a final refusal was asked again"
        except Unreachable as e:
            assert "run again to continue" in str(e)
        assert read_repo(the_hub) in ({}, release)
        the_hub.cues = {}
        if not succeeded or fault is Fault.LOST:  # a lost answer must not lead to a second commit
            publish(folder, pull_request=pull_request)
        if pull_request:
            assert len(the_hub.repos[REPO].pulls) == 1
            the_hub.merge(REPO, 1)
        assert read_repo(the_hub) == release
        assert len(list_commits(the_hub)) == 1 + pull_request
        reset(the_hub)


def test_files_that_were_sent_are_not_sent_again(the_hub: Hub, folder: Path) -> None:
    commit = next(n for n, r in enumerate(list_paths(the_hub, folder)) if "/commit/" in r)
    the_hub.cues = {commit: Fault.REFUSED}
    with pytest.raises(InputError):
        publish(folder)
    the_hub.requests.clear()
    the_hub.cues = {}
    assert publish(folder).fresh
    assert not the_hub.asked("PUT", "")


def test_wherever_the_process_is_killed_nobody_sees_half_and_one_commit_is_made(
    the_hub: Hub, folder: Path, publisher: Publisher
) -> None:
    release = read_folder(folder)
    for k in range(count_requests(the_hub, folder)):
        the_hub.cues = {k: publisher.kill}
        assert publisher.run(REPO)[0] == -signal.SIGKILL
        assert read_repo(the_hub) in ({}, release)
        the_hub.cues = {}
        publish(folder)
        assert read_repo(the_hub) == release
        assert len(list_commits(the_hub)) == 1
        reset(the_hub)


def test_an_interrupted_publication_ends_soon_and_not_with_its_largest_file(
    the_hub: Hub, folder: Path
) -> None:
    paths = list_paths(the_hub, folder)
    upload = next(n for n, path in enumerate(paths) if path.startswith("/upload/"))
    reached, go_on = Event(), Event()

    def hold_up() -> None:
        reached.set()
        go_on.wait(60)

    the_hub.cues = {upload: hold_up}
    line = [sys.executable, "-c", "from quant.cli import main; main()", "publish"]
    line += [str(folder), REPO]
    env = {"HF_ENDPOINT": the_hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent)}
    with subprocess.Popen(line, env=os.environ | env, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert reached.wait(60)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=8)
        finally:
            go_on.set()
            process.kill()
    assert process.returncode == 3
    assert err.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert read_repo(the_hub) == {}
    the_hub.cues = {}
    assert publish(folder).fresh


def test_the_command_prints_the_page_of_the_release_and_then_that_it_was_there(
    the_hub: Hub, folder: Path, publisher: Publisher
) -> None:
    code, out, err = publisher.run(REPO)
    tag = plan_change(folder, Destination(REPO)).tag
    assert (code, out) == (0, f"{the_hub.url}/{REPO}/tree/{tag}\n")
    assert err.startswith(f"{REPO} (to be made, public): one commit, tag release-")
    again = publisher.run("--repo", REPO)
    assert again[2].endswith("nothing to do: this release is there already\n")


def test_a_dry_run_prints_the_change(the_hub: Hub, folder: Path, publisher: Publisher) -> None:
    code, out, _ = publisher.run(REPO, "--dry-run")
    assert (code, out.splitlines()) == (0, list(plan_change(folder, Destination(REPO)).lines))
    assert the_hub.repos == {}


@pytest.mark.parametrize(
    ("args", "env", "code", "message"),
    [
        ((), {}, 2, "expected one repo to publish to, found none"),
        ((REPO, "--repo", "other/one"), {}, 2, "found somebody/tiny-GGUF and other/one"),
        (("tiny",), {}, 2, "repo: expected OWNER/NAME, found 'tiny'"),
        ((REPO,), {"HF_TOKEN": ""}, 2, "HF_TOKEN: not set"),
        (
            (REPO,),
            {"HF_TOKEN": "hf_NobodysTokenAtAllXX"},
            2,
            "HF_TOKEN: the hub does not know this token",
        ),
        (
            (REPO, "--parent", "main"),
            {},
            2,
            "parent: expected a commit (40 letters of hex), found 'main'",
        ),
        ((REPO,), {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "the hub did not deliver"),
        ((TOKEN,), {}, 2, "repo: expected OWNER/NAME, found '…'"),
    ],
)
def test_what_cannot_be_published_is_one_line_and_an_exit_code(
    publisher: Publisher, args: tuple[str, ...], env: dict[str, str], code: int, message: str
) -> None:
    actual, out, err = publisher.run(*args, **env)
    assert (actual, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert message in err
