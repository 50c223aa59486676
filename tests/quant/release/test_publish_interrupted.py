"""A publication that is interrupted, at every request: nothing is shown half, and one commit is made in the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from quant.errors import InputError, Unreachable
from quant.hub.upload import Destination
from quant.release.change import plan_change
from tests.hub import Fault, Hub
from tests.quant.conftest import TOKEN
from tests.quant.release.test_publish import (
    REPO,
    forget,
    held,
    made,
    paths_of,
    put,
    shown,
    write_release,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content="
)  # the hub's client to its own HTTP library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_release(tmp_path / "tiny")


def requests_of(the_hub: Hub, folder: Path, **target: Any) -> int:
    """Return how many requests a publication makes when nothing happens."""
    for _ in range(2):  # the client's first publication in a process asks one thing more
        put(folder, **target)
        count = len(the_hub.requests)
        forget(the_hub)
    return count


@pytest.mark.parametrize(
    "fault", [Fault.REFUSED, Fault.BROKEN, Fault.BUSY, Fault.DROPPED, Fault.LOST]
)
@pytest.mark.parametrize("pull_request", [False, True], ids=["commit", "pull request"])
def test_whichever_request_fails_nothing_is_shown_half_and_one_commit_is_made(
    the_hub: Hub, folder: Path, fault: Fault, pull_request: bool
) -> None:
    whole = held(folder)
    count = requests_of(the_hub, folder, pull_request=pull_request)
    assert count > 20
    for k in range(count):
        the_hub.cues = {k: fault}
        try:
            put(folder, pull_request=pull_request)
            assert fault is not Fault.REFUSED
        except InputError as e:
            assert fault is Fault.REFUSED
            assert len(e.problems) == 1
            refused, *later = ((r.method, r.path, r.query) for r in the_hub.requests[k:])
            of_each_file = refused[1].endswith(("/verify", "/complete"))
            assert refused not in later or of_each_file, "a refusal for good was asked again"
        except Unreachable as e:
            assert "run again to continue" in str(e)
        assert shown(the_hub) in ({}, whole)
        the_hub.cues = {}
        put(folder, pull_request=pull_request)
        if pull_request:
            assert len(the_hub.repos[REPO].pulls) == 1
            the_hub.merge(REPO, 1)
        assert shown(the_hub) == whole
        assert len(made(the_hub)) == 1 + pull_request
        forget(the_hub)


def test_what_was_sent_is_not_sent_again(the_hub: Hub, folder: Path) -> None:
    commit = next(n for n, r in enumerate(paths_of(the_hub, folder)) if "/commit/" in r)
    the_hub.cues = {commit: Fault.REFUSED}
    with pytest.raises(InputError):
        put(folder)
    the_hub.requests.clear()
    the_hub.cues = {}
    assert put(folder).fresh
    assert not the_hub.asked("PUT", "")


class Publisher:
    """``quant publish`` in a process of its own."""

    def __init__(self, the_hub: Hub, folder: Path) -> None:
        self.folder = folder
        self.env = {
            "PATH": os.environ["PATH"],
            "HF_ENDPOINT": the_hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        self.env |= {"HF_HOME": str(folder.parent / "hf"), "no_proxy": "*"}
        self.env |= {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        line = [
            sys.executable,
            "-c",
            "from quant.cli import main; main()",
            "publish",
            str(self.folder),
            *args,
        ]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, env=self.env | env, **pipes)

    def run(self, *args: str, **env: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error; the token is in neither."""
        process = self.start(*args, **env)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert TOKEN not in out + err
        assert "Traceback" not in err
        return process.returncode, out, err


@pytest.fixture
def publisher(the_hub: Hub, folder: Path) -> Publisher:
    return Publisher(the_hub, folder)


def test_wherever_the_process_is_killed_nothing_is_shown_half_and_one_commit_is_made(
    the_hub: Hub, folder: Path, publisher: Publisher
) -> None:
    whole = held(folder)
    count = requests_of(the_hub, folder)
    running: list[subprocess.Popen[str]] = []
    for k in range(count):
        the_hub.cues = {k: lambda: running[-1].kill()}
        running.append(publisher.start(REPO))
        running[-1].communicate(timeout=60)
        assert running[-1].returncode == -signal.SIGKILL
        assert shown(the_hub) in ({}, whole)
        the_hub.cues = {}
        put(folder)
        assert shown(the_hub) == whole
        assert len(made(the_hub)) == 1
        forget(the_hub)


def test_an_interrupted_publication_ends_soon_and_not_with_its_largest_file(
    the_hub: Hub, folder: Path, publisher: Publisher
) -> None:
    upload = next(
        n for n, path in enumerate(paths_of(the_hub, folder)) if path.startswith("/upload/")
    )
    reached, go_on = Event(), Event()

    def slow() -> None:
        reached.set()
        go_on.wait(60)

    the_hub.cues = {upload: slow}
    process = publisher.start(REPO)
    try:
        assert reached.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=8)
    finally:
        go_on.set()
        process.kill()
    assert process.returncode == 3
    assert err.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert shown(the_hub) == {}
    the_hub.cues = {}
    assert put(folder).fresh


def test_the_command_says_where_the_release_stands_and_the_second_time_that_it_stood_there(
    the_hub: Hub, folder: Path, publisher: Publisher
) -> None:
    code, out, err = publisher.run(REPO)
    assert (code, out) == (
        0,
        f"{the_hub.url}/{REPO}/tree/{plan_change(folder, Destination(REPO)).tag}\n",
    )
    assert err.startswith(f"{REPO} (to be made, public): one commit, tag release-")
    assert publisher.run("--repo", REPO)[2].endswith(
        "nothing to do: this release stands there already\n"
    )


def test_a_dry_run_prints_the_change(the_hub: Hub, folder: Path, publisher: Publisher) -> None:
    code, out, _ = publisher.run(REPO, "--dry-run")
    assert (code, out.splitlines()) == (0, list(plan_change(folder, Destination(REPO)).lines))
    assert the_hub.repos == {}


@pytest.mark.parametrize(
    ("args", "env", "code", "said"),
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
    publisher: Publisher, args: tuple[str, ...], env: dict[str, str], code: int, said: str
) -> None:
    found, out, err = publisher.run(*args, **env)
    assert (found, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert said in err
