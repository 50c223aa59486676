import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub as hubs
from tests.hub import Hub
from tests.quant.hub.test_checkpoint import CHECKPOINT, NEVER, RECIPE, REPO, SHARDS


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hubs.running() as running:
        running.add(REPO, {**CHECKPOINT, **NEVER})
        yield running


def quant(hub: Hub, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "tiny.toml").write_text(RECIPE)
    env = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "hf"),
    }
    line = [sys.executable, "-c", "from quant.cli import main; main()", *args]
    return subprocess.run(
        line, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def lock_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "tiny.lock.json").read_text()))


def test_a_lock_names_the_commit_of_the_branch_and_a_digest_of_every_file(
    hub: Hub, tmp_path: Path
) -> None:
    done = quant(hub, tmp_path, "lock", "tiny.toml")
    assert done.returncode == 0, done.stderr
    locked = lock_of(tmp_path)
    assert locked["revision"] == hub.head(REPO).oid
    by_path = {f["path"]: f for f in locked["files"]}  # type: ignore[attr-defined]
    assert set(by_path) == set(CHECKPOINT)
    assert by_path[SHARDS[0]]["sha256"] == hubs.sha256(CHECKPOINT[SHARDS[0]])
    assert by_path["config.json"]["git"] == hubs.git_digest(CHECKPOINT["config.json"])


def test_a_locked_model_is_pulled_at_its_commit_even_when_the_branch_has_moved(
    hub: Hub, tmp_path: Path
) -> None:
    assert quant(hub, tmp_path, "lock", "tiny.toml").returncode == 0
    hub.add(REPO, {**CHECKPOINT, "tokenizer.json": b'{"model": {"new": 1}}'})
    done = quant(hub, tmp_path, "pull", "tiny.toml", "--work", "work")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "tokenizer.json").read_bytes() == CHECKPOINT[
        "tokenizer.json"
    ]


def test_a_model_that_is_not_locked_is_refused_with_the_next_step(hub: Hub, tmp_path: Path) -> None:
    done = quant(hub, tmp_path, "pull", "tiny.toml", "--work", "work")
    assert done.returncode == 2
    assert "quant lock MODEL" in done.stderr


def test_files_that_are_not_the_locked_ones_stop_the_build(hub: Hub, tmp_path: Path) -> None:
    assert quant(hub, tmp_path, "lock", "tiny.toml").returncode == 0
    path = tmp_path / "tiny.lock.json"
    path.write_text(path.read_text().replace(hubs.sha256(CHECKPOINT[SHARDS[0]]), "0" * 64))
    done = quant(hub, tmp_path, "pull", "tiny.toml", "--work", "work")
    assert done.returncode == 1
    assert SHARDS[0] in done.stderr and "0" * 64 in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a lock"),
        ('{"repo": "a/b", "revision": "x", "files": []}', "expected a commit of org/tiny"),
    ],
)
def test_a_broken_lock_is_refused(hub: Hub, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tiny.lock.json").write_text(text)
    done = quant(hub, tmp_path, "pull", "tiny.toml", "--work", "work")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_branch_that_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = quant(hub, tmp_path, "lock", "tiny.toml", "--revision", "v9")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "tiny.lock.json").exists()
