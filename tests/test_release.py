"""A release on its way to strangers and back: published, fetched, verified, talked to, and made again from its manifest."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub as hubs
from tests.hub import Hub

pytestmark = pytest.mark.tools

QUANT = Path(sys.executable).with_name("quant")
TOKEN = "hf_PlantedTokenOfThePublisher"
REPO = "somebody/tiny-glm-GGUF"
SOME = ("-v", "UD-TQ1_0", "-v", "UD-Q2_K_XL")
FETCH = "import sys; from huggingface_hub import snapshot_download as get; print(get(sys.argv[1], local_dir=sys.argv[2]))"


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hubs.running(tmp_path_factory.mktemp("hub")) as running:
        running.tokens[TOKEN] = "write"
        yield running


def run(the_hub: Hub, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command with the hub and the token in its environment, and nothing of another login."""
    home = the_hub.folder.parent / "home"
    given = {
        "HF_ENDPOINT": the_hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "no_proxy": "*",
    }
    return subprocess.run(
        args, env=os.environ | given | env, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def published(the_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A build that published its release: the folder that it was told, and everything that it said."""
    out = tmp_path_factory.mktemp("out")
    done = run(
        the_hub,
        QUANT,
        "build",
        "tiny-glm",
        "-o",
        out,
        *SOME,
        "--repo",
        REPO,
        "--as-ready",
        "--limit",
        "500M",
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


@pytest.fixture(scope="module")
def fetched(
    the_hub: Hub, published: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The release as the hub's own client fetches it."""
    folder = tmp_path_factory.mktemp("fetched") / "tiny-glm"
    done = run(the_hub, sys.executable, "-c", FETCH, REPO, folder, HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_build_with_a_repo_ends_with_one_commit_that_holds_the_release(
    the_hub: Hub, published: tuple[Path, str]
) -> None:
    out, said = published
    head = the_hub.head(REPO)
    assert f"{the_hub.url}/{REPO}/tree/release-" in said
    assert len(the_hub.repos[REPO].commits) == 2  # the first is the hub's own
    there = {
        n: the_hub.object(b.sha256).read_bytes()
        for n, b in head.files.items()
        if n != ".gitattributes"
    }
    assert there == {
        p.relative_to(out / "tiny-glm").as_posix(): p.read_bytes()
        for p in (out / "tiny-glm").rglob("*")
        if p.is_file()
    }


def test_a_build_that_sends_as_ready_sends_each_variant_once_and_before_the_release_is_packaged(
    the_hub: Hub, published: tuple[Path, str]
) -> None:
    stages = [
        line.split("]")[1].split()[0] for line in published[1].splitlines() if line.startswith("[")
    ]
    assert stages.count("send") == 2
    assert (
        stages.index("send")
        < len(stages) - 1 - stages[::-1].index("smoke")
        < stages.index("package")
    )
    sent = [r.path for r in the_hub.asked("PUT", "^/upload/")]
    assert len(sent) == len(set(sent))


def test_the_same_build_again_publishes_nothing(the_hub: Hub, published: tuple[Path, str]) -> None:
    before = dict(the_hub.repos[REPO].commits)
    done = run(the_hub, QUANT, "build", "tiny-glm", "-o", published[0], *SOME, "--repo", REPO)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    assert the_hub.repos[REPO].commits == before


def test_what_was_fetched_is_verified(the_hub: Hub, fetched: Path) -> None:
    done = run(the_hub, QUANT, "verify", fetched)
    assert done.returncode == 0, done.stderr
    assert "not checked: that the model talks" in done.stdout


def test_what_was_fetched_talks(the_hub: Hub, fetched: Path) -> None:
    first = next(fetched.glob("UD-Q2_K_XL/*-00001-of-*.gguf"))
    for path in (fetched / "tiny-glm-UD-TQ1_0.gguf", first):
        done = run(the_hub, QUANT, "smoke", path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_was_fetched_is_made_again_to_the_same_bytes(
    the_hub: Hub, fetched: Path, tmp_path: Path
) -> None:
    done = run(
        the_hub, QUANT, "rebuild", fetched / "manifest.json", "-o", tmp_path / "again", HF_TOKEN=""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [
        p
        for p in fetched.rglob("*")
        if p.is_file() and ".cache" not in p.parts and p.name != ".gitattributes"
    ]
    assert f"tiny-glm: {len(files)} files hold the same bytes" in done.stdout
    for path in files:
        assert (
            tmp_path / "again" / "tiny-glm" / path.relative_to(fetched)
        ).read_bytes() == path.read_bytes()


def test_a_rebuild_that_comes_out_otherwise_names_the_file(
    the_hub: Hub, published: tuple[Path, str], tmp_path: Path
) -> None:
    """The same work, found done in the store, against a manifest that promises other bytes."""
    manifest = json.loads((published[0] / "tiny-glm" / "manifest.json").read_text())
    manifest["variants"][0]["files"][0]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(published[0] / ".work", tmp_path / "work")
    done = run(
        the_hub,
        QUANT,
        "rebuild",
        tmp_path / "manifest.json",
        "-o",
        tmp_path / "again",
        "--work",
        tmp_path / "work",
    )
    assert done.returncode == 1
    assert f"tiny-glm-UD-TQ1_0.gguf: expected sha256 {'0' * 64}, found " in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.cpp": "0.0.1"}, "llama.cpp: expected 0.0.1, found"),
        ({"format": "other"}, "format: expected 'gguf-foundry release 3', found 'other'"),
    ],
)
def test_a_manifest_that_cannot_be_made_again_is_refused(
    the_hub: Hub, published: tuple[Path, str], tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    manifest = json.loads((published[0] / "tiny-glm" / "manifest.json").read_text()) | changes
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = run(the_hub, QUANT, "rebuild", tmp_path / "manifest.json", "-o", tmp_path / "again")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_token_is_nowhere(the_hub: Hub, published: tuple[Path, str], fetched: Path) -> None:
    out, said = published
    assert TOKEN not in said
    for folder in (out, fetched, the_hub.folder, the_hub.folder.parent / "home"):
        for path in folder.rglob("*"):
            if path.is_file():
                assert TOKEN.encode() not in path.read_bytes(), path
    assert {r.token for r in the_hub.requests} == {
        f"Bearer {TOKEN}",
        None,
    }  # it was used, and not shown to the storage
    assert {r.token for r in the_hub.requests if r.host.startswith("localhost")} == {None}


def test_the_files_say_whose_they_are_and_nothing_of_this_machine(
    published: tuple[Path, str],
) -> None:
    from quant.llama.gguf import read_headers

    for first in ("tiny-glm-UD-TQ1_0.gguf", "UD-Q2_K_XL/tiny-glm-UD-Q2_K_XL-00001-of-00002.gguf"):
        found = read_headers(published[0] / "tiny-glm" / first)[0].metadata
        assert {
            k: found.get(f"general.{k}")
            for k in ("name", "basename", "size_label", "license", "languages", "tags")
        } == {
            "name": "tiny-glm",
            "basename": "tiny-glm",
            "size_label": "8x4.5M",
            "license": "apache-2.0",
            "languages": ["en"],
            "tags": ["gguf", "imatrix", "conversational", "text-generation"],
        }
        assert {k.rpartition(".")[2] for k in found if k.startswith("general.sampling.")} == {
            "temp",
            "top_p",
            "top_k",
            "min_p",
            "penalty_repeat",
        }
        assert not [k for k, v in found.items() if isinstance(v, str) and str(published[0]) in v]
