"""Pulling a commit of the hub, through its real client in a process of its own: it reads its settings when it is imported."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from quant.core import files
from quant.core.errors import Unreachable
from quant.hub import download
from quant.hub.download import HubFile
from tests import hub as hubs
from tests.hub import Fault, Hub
from tests.quant.hub.test_checkpoint import (
    CHECKPOINT,
    NEVER,
    RECIPE,
    REPO,
    SHARDS,
    TOKEN,
    safetensors,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hubs.running() as running:
        yield running


class Puller:
    """``quant pull`` of the repo, in one work folder."""

    def __init__(self, hub: Hub, folder: Path, commit: str) -> None:
        self.hub, self.folder, self.commit = hub, folder, commit
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(RECIPE)
        self.env = {
            "PATH": os.environ["PATH"],
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        self.env |= {
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "*",
        }
        self.env |= {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}

    def start(self, **env: str) -> subprocess.Popen[str]:
        line = [
            sys.executable,
            "-c",
            "from quant.cli import main; main()",
            "pull",
            str(self.recipe),
        ]
        line += ["--revision", self.commit, "--work", str(self.folder / "work")]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, env=self.env | env, **pipes)

    def run(self, **env: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error; the token is in neither."""
        process = self.start(**env)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert TOKEN not in out + err
        assert "Traceback" not in err
        return process.returncode, out, err

    def kept(self) -> dict[str, bytes]:
        """Every file of the work folder's checkpoints, but for the notes of the hub's client."""
        folders = self.folder.glob("work/tiny/source/*/checkpoint")
        paths = {
            p.relative_to(f).as_posix(): p for f in folders for p in f.rglob("*") if p.is_file()
        }
        return {
            name: path.read_bytes()
            for name, path in paths.items()
            if not name.startswith(".cache/")
        }


@pytest.fixture
def puller(hub: Hub, tmp_path: Path) -> Puller:
    return Puller(hub, tmp_path, hub.add(REPO, {**CHECKPOINT, **NEVER}))


def test_a_commit_is_pulled_once_and_never_asked_for_again(hub: Hub, puller: Puller) -> None:
    code, out, err = puller.run()
    assert (code, err) == (
        0,
        f"6 files, {sum(map(len, CHECKPOINT.values())):,} bytes, all verified\n",
    )
    assert {p.name: p.read_bytes() for p in Path(out.strip()).iterdir()} == CHECKPOINT
    asked = [r for r in hub.requests if r.path.endswith(tuple(NEVER))]
    assert asked == []
    hub.requests.clear()
    assert puller.run() == (code, out, err)
    assert hub.requests == []


def test_the_token_is_sent_to_the_hub_and_not_to_its_storage(hub: Hub, puller: Puller) -> None:
    assert puller.run()[0] == 0
    assert {r.token for r in hub.requests if r.host.startswith("127.0.0.1")} >= {f"Bearer {TOKEN}"}
    assert {r.token for r in hub.requests if r.host.startswith("localhost")} == {None}


@pytest.mark.parametrize("revision", ["main", "a" * 39, "A" * 40])
def test_a_revision_that_can_move_is_refused_before_any_request(
    hub: Hub, puller: Puller, revision: str
) -> None:
    puller.commit = revision
    code, _, err = puller.run()
    assert code == 2
    assert err.startswith(
        f"error: source.revision: expected a commit of org/tiny (40 letters of hex), found {revision!r}"
    )
    assert hub.requests == []


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_wrong_bytes_of_the_right_length_are_detected_and_fetched_again_by_the_next_run(
    hub: Hub, puller: Puller, name: str
) -> None:
    hub.plant(name, Fault.WRONG, times=1)
    code, out, err = puller.run()
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert f"{name}: expected " in err
    assert puller.kept().keys() == CHECKPOINT.keys() - {name}
    large = [len(hub.gets(shard)) for shard in SHARDS]
    assert puller.run()[0] == 0
    assert puller.kept() == CHECKPOINT
    assert [len(hub.gets(shard)) for shard in SHARDS] == [
        n + (shard == name) for n, shard in zip(large, SHARDS, strict=True)
    ]


@pytest.mark.parametrize(
    ("path", "fault"),
    [(SHARDS[1], Fault.BUSY), (REPO, Fault.BROKEN), (SHARDS[1], Fault.CUT)],
)
def test_one_server_error_delays_a_pull_and_does_not_stop_it(
    hub: Hub, puller: Puller, path: str, fault: Fault
) -> None:
    hub.plant(path, fault, times=1)
    assert puller.run()[0] == 0
    assert puller.kept() == CHECKPOINT
    assert hub.faults[path] == (fault, 0)


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        (SHARDS[1], Fault.RESET, "Connection reset by peer"),
        (
            SHARDS[1],
            Fault.HTML,
            f"file should be of size {len(CHECKPOINT[SHARDS[1]])} but has size",
        ),
        (f"storage/{SHARDS[1]}", Fault.BROKEN, "500 Internal Server Error"),
    ],
)
def test_a_file_that_does_not_come_is_one_line_and_the_next_run_continues(
    hub: Hub, puller: Puller, path: str, fault: Fault, message: str
) -> None:
    hub.plant(path, fault, times=1)
    code, _, err = puller.run()
    assert code == 1
    assert err.startswith(f"error: {REPO}@{puller.commit}: the hub did not deliver (")
    assert message in err
    assert err.endswith("; run again to continue\n")
    assert len(err.splitlines()) == 1
    assert hubs.SIGNED not in err
    assert puller.run()[0] == 0
    assert puller.kept() == CHECKPOINT


def test_a_hub_that_cannot_be_reached_is_one_line(puller: Puller) -> None:
    code, _, err = puller.run(HF_HUB_OFFLINE="1")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert f"error: {REPO}@{puller.commit}: the hub did not deliver" in err


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        (
            REPO,
            Fault.GATED,
            "org/tiny: its owners ask for something first; see https://huggingface.co/org/tiny, and set HF_TOKEN",
        ),
        (
            SHARDS[1],
            Fault.GATED,
            "org/tiny: its owners ask for something first; see https://huggingface.co/org/tiny, and set HF_TOKEN",
        ),
        (
            "missing",
            None,
            "org/tiny: not on the hub, or private; if it is private, set HF_TOKEN to a token that may read it",
        ),
        ("commit", None, "org/tiny: expected a commit of it, found '" + "0" * 40),
        (
            "weights",
            None,
            ": expected weights in *.safetensors, found pytorch_model.bin; name a repo",
        ),
    ],
)
def test_a_repo_that_is_refused_is_one_clear_line(
    hub: Hub, puller: Puller, path: str, fault: Fault | None, message: str
) -> None:
    if fault:
        hub.plant(path, fault)
    elif path == "missing":
        hub.repos.clear()
    elif path == "commit":
        puller.commit = "0" * 40
    else:
        puller.commit = hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    code, out, err = puller.run()
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert path != "weights" or hub.gets() == []


def test_a_pull_that_was_killed_continues_and_ends_with_the_same_files(
    hub: Hub, puller: Puller
) -> None:
    big = {**CHECKPOINT, SHARDS[1]: safetensors(4_000_000, "b")}
    puller.commit = hub.add(REPO, big)
    hub.bytes_per_second = 1_000_000
    process = puller.start()
    deadline = time.monotonic() + 30
    while not (CHECKPOINT.keys() - {SHARDS[1]} <= puller.kept().keys() and hub.gets(SHARDS[1])):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert SHARDS[1] not in puller.kept()
    assert len(list(puller.folder.rglob("*.incomplete"))) == 1
    assert puller.run(HF_HUB_OFFLINE="1")[0] == 1
    assert (
        list(puller.folder.rglob("*.incomplete")) == []
    )  # it can be gigabytes, and nothing would go on with it
    hub.bytes_per_second = None
    assert puller.run()[0] == 0
    assert puller.kept() == big
    assert len(hub.gets(SHARDS[0])) == 1
    assert [
        p.name for p in puller.folder.glob("work/tiny/source/*") if p.suffix == files.PARTIAL
    ] == []


def test_an_interrupted_pull_ends_soon_and_not_with_its_largest_file(
    hub: Hub, puller: Puller
) -> None:
    puller.commit = hub.add(REPO, {**CHECKPOINT, SHARDS[1]: safetensors(100_000_000, "b")})
    hub.bytes_per_second = 10_000_000
    process = puller.start()
    try:
        deadline = time.monotonic() + 30
        while not hub.gets(SHARDS[1]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=8)
    finally:
        process.kill()
    assert (process.returncode, err.strip()) == (
        3,
        "interrupted; run the same command again to continue",
    )


def test_a_file_that_was_damaged_in_the_store_is_fetched_again_alone(
    hub: Hub, puller: Puller
) -> None:
    folder = Path(puller.run()[1].strip())
    (folder / SHARDS[1]).write_bytes(CHECKPOINT[SHARDS[1]][:-1])
    hub.requests.clear()
    assert puller.run()[0] == 0
    assert puller.kept() == CHECKPOINT
    assert (len(hub.gets(SHARDS[0])), len(hub.gets(SHARDS[1]))) == (0, 1)


def test_a_transfer_that_hangs_is_ended_and_another_goes_on(hub: Hub, puller: Puller) -> None:
    puller.commit = hub.add(REPO, {**CHECKPOINT, SHARDS[1]: safetensors(4_000_000, "b")})
    hub.plant(SHARDS[1], Fault.STALL, times=1)
    code, _, err = puller.run(QUANT_STALL_SECONDS="3", HF_HUB_DOWNLOAD_TIMEOUT="600")
    assert code == 0, err
    assert len(puller.kept()) == len(CHECKPOINT)
    assert (len(hub.gets(SHARDS[0])), len(hub.gets(SHARDS[1]))) == (
        1,
        2,
    )  # what was there is not fetched again


def test_a_transfer_that_hangs_again_is_one_line(hub: Hub, puller: Puller) -> None:
    puller.commit = hub.add(REPO, {**CHECKPOINT, SHARDS[1]: safetensors(4_000_000, "b")})
    hub.plant(SHARDS[1], Fault.STALL)
    code, _, err = puller.run(QUANT_STALL_SECONDS="2", HF_HUB_DOWNLOAD_TIMEOUT="600")
    assert code == 1
    assert err.splitlines()[-1].endswith(
        "nothing moved for 2 s, without Xet either; run again to continue"
    )


def test_after_a_stall_the_downloader_is_started_without_xet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    settings: list[str | None] = []

    def stalls(command: list[Any], *, env: Mapping[str, str], **_: Any) -> None:
        settings.append(env.get("HF_HUB_DISABLE_XET"))
        if len(settings) == 1:
            raise download.TransferStallError
        Path(command[-1]).write_text('{"result": null}')

    monkeypatch.setattr("quant.core.process.run_program", stalls)
    download.download_files(REPO, "0" * 40, [HubFile("a", 1)], tmp_path / "checkpoint")
    assert settings == [None, "1"]
    settings.clear()
    with pytest.raises(Unreachable, match="nothing moved for 900 s; run again"):
        download.download_files(
            REPO, "0" * 40, [HubFile("a", 50 * 10**9 + 1)], tmp_path / "checkpoint"
        )
    assert settings == [None]


def test_a_file_is_checked_as_soon_as_it_is_there_and_not_when_all_are(
    hub: Hub, puller: Puller
) -> None:
    puller.commit = hub.add(REPO, {**CHECKPOINT, SHARDS[1]: safetensors(4_000_000, "b")})
    hub.plant(SHARDS[0], Fault.WRONG, times=1)
    hub.bytes_per_second = 400_000
    process = puller.start()
    try:
        deadline = time.monotonic() + 30
        while not (
            hub.gets(SHARDS[0])
            and "config.json" in puller.kept()
            and SHARDS[0] not in puller.kept()
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(1)
        assert process.poll() is None, "the other shard is under way"
        assert SHARDS[0] not in puller.kept()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "name",
    ["-rf.json", "a\\\\b.json", "C:x.json", "a\nb.json", "." + "x.json", "x" * 300 + ".json"],
)
def test_a_name_that_is_not_safe_to_write_is_refused_before_anything_is_fetched(
    hub: Hub, puller: Puller, name: str
) -> None:
    puller.commit = hub.add(REPO, {**CHECKPOINT, name: b"{}"})
    code, _, err = puller.run()
    assert code == 2
    assert f"expected names of files, found {name!r}, which is not safe to write here" in err
    assert hub.gets() == []


def test_a_rate_limit_of_the_hub_is_waited_for(hub: Hub, puller: Puller) -> None:
    first = next(
        n for n, r in enumerate(_requests(hub, puller)) if r.endswith("/tree/" + puller.commit)
    )
    hub.cues = {first: Fault.BUSY}
    began = time.monotonic()
    assert puller.run()[0] == 0
    assert time.monotonic() - began >= 1


def _requests(hub: Hub, puller: Puller) -> list[str]:
    """The paths that a pull asks for, which is then forgotten."""
    assert puller.run()[0] == 0
    paths = [r.path for r in hub.requests]
    hub.requests.clear()
    files.remove(puller.folder / "work")
    return paths


@pytest.mark.parametrize("token", ["hf_With A Blank In Itsss", "hf_WithA\nLineInItXXXXXX"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_quoted(
    puller: Puller, token: str
) -> None:
    code, _, err = puller.run(HF_TOKEN=token)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "HF_TOKEN: expected a token of the hub" in err
    assert token not in err


def test_a_token_that_a_login_left_is_not_used(hub: Hub, puller: Puller) -> None:
    (puller.folder / "hf").mkdir()
    (puller.folder / "hf" / "token").write_text("hf_LeftByALoginOfSomebody")
    assert puller.run(HF_TOKEN="")[0] == 0
    assert {r.token for r in hub.requests} == {None}
