"""A release on its way to strangers: published, downloaded, verified, tested, and rebuilt."""

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
    """Run a command with the hub and the token in its environment, and nothing of another login."""
    home = the_hub.folder.parent / "home"
    settings = {
        "HF_ENDPOINT": the_hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "no_proxy": "*",
    }
    return subprocess.run(
        args,
        env=os.environ | settings | env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def published(the_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the output folder of a build that published its release, and everything it printed."""
    out = tmp_path_factory.mktemp("out")
    process = run(
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
    assert process.returncode == 0, process.stderr
    return out, process.stdout + process.stderr


@pytest.fixture(scope="module")
def downloaded(
    the_hub: Hub, published: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the release as the hub's own client downloads it."""
    folder = tmp_path_factory.mktemp("downloaded") / "tiny-glm"
    process = run(the_hub, sys.executable, "-c", FETCH, REPO, folder, HF_TOKEN="")
    assert process.returncode == 0, process.stderr
    return folder


def test_a_build_with_a_repo_ends_with_one_commit_that_holds_the_release(
    the_hub: Hub, published: tuple[Path, str]
) -> None:
    out, output = published
    head = the_hub.head(REPO)
    assert f"{the_hub.url}/{REPO}/tree/release-" in output
    assert len(the_hub.repos[REPO].commits) == 2  # the first is the hub's own
    remote = {
        n: the_hub.object(b.sha256).read_bytes()
        for n, b in head.files.items()
        if n != ".gitattributes"
    }
    assert remote == {
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


def test_the_same_build_publishes_nothing_the_second_time(
    the_hub: Hub, published: tuple[Path, str]
) -> None:
    before = dict(the_hub.repos[REPO].commits)
    process = run(the_hub, QUANT, "build", "tiny-glm", "-o", published[0], *SOME, "--repo", REPO)
    assert process.returncode == 0, process.stderr
    assert "nothing to do" in process.stderr
    assert the_hub.repos[REPO].commits == before


def test_a_downloaded_release_verifies(the_hub: Hub, downloaded: Path) -> None:
    process = run(the_hub, QUANT, "verify", downloaded)
    assert process.returncode == 0, process.stderr
    assert "not checked: that the model answers" in process.stdout


def test_a_downloaded_release_passes_its_smoke_test(the_hub: Hub, downloaded: Path) -> None:
    first = next(downloaded.glob("UD-Q2_K_XL/*-00001-of-*.gguf"))
    for path in (downloaded / "tiny-glm-UD-TQ1_0.gguf", first):
        process = run(the_hub, QUANT, "smoke", path)
        assert process.returncode == 0, process.stdout + process.stderr


def test_a_downloaded_release_is_rebuilt_to_the_same_bytes(
    the_hub: Hub, downloaded: Path, tmp_path: Path
) -> None:
    process = run(
        the_hub,
        QUANT,
        "rebuild",
        downloaded / "manifest.json",
        "-o",
        tmp_path / "again",
        HF_TOKEN="",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    files = [
        p
        for p in downloaded.rglob("*")
        if p.is_file() and ".cache" not in p.parts and p.name != ".gitattributes"
    ]
    assert f"tiny-glm: {len(files)} files hold the same bytes" in process.stdout
    for path in files:
        assert (
            tmp_path / "again" / "tiny-glm" / path.relative_to(downloaded)
        ).read_bytes() == path.read_bytes()


def test_a_rebuild_with_other_bytes_names_the_file(
    the_hub: Hub, published: tuple[Path, str], tmp_path: Path
) -> None:
    """The stages are in the store already; the manifest promises other bytes."""
    manifest = json.loads((published[0] / "tiny-glm" / "manifest.json").read_text())
    manifest["variants"][0]["files"][0]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(published[0] / ".work", tmp_path / "work")
    process = run(
        the_hub,
        QUANT,
        "rebuild",
        tmp_path / "manifest.json",
        "-o",
        tmp_path / "again",
        "--work",
        tmp_path / "work",
    )
    assert process.returncode == 1
    assert f"tiny-glm-UD-TQ1_0.gguf: expected sha256 {'0' * 64}, found " in process.stderr


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({"llama.cpp": "0.0.1"}, "llama.cpp: expected 0.0.1, found"),
        ({"format": "other"}, "format: expected 'gguf-foundry release 3', found 'other'"),
    ],
)
def test_a_manifest_that_cannot_be_rebuilt_is_refused(
    the_hub: Hub, published: tuple[Path, str], tmp_path: Path, changes: dict[str, str], output: str
) -> None:
    manifest = json.loads((published[0] / "tiny-glm" / "manifest.json").read_text()) | changes
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    process = run(the_hub, QUANT, "rebuild", tmp_path / "manifest.json", "-o", tmp_path / "again")
    assert process.returncode == 2
    assert output in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_the_token_is_nowhere(the_hub: Hub, published: tuple[Path, str], downloaded: Path) -> None:
    out, output = published
    assert TOKEN not in output
    for folder in (out, downloaded, the_hub.folder, the_hub.folder.parent / "home"):
        for path in folder.rglob("*"):
            if path.is_file():
                assert TOKEN.encode() not in path.read_bytes(), path
    assert {r.token for r in the_hub.requests} == {
        f"Bearer {TOKEN}",
        None,
    }  # it was used, and not shown to the storage
    assert {r.token for r in the_hub.requests if r.host.startswith("localhost")} == {None}


def test_the_files_have_their_origin_in_their_metadata_and_nothing_of_this_machine(
    published: tuple[Path, str],
) -> None:
    from quant.llama.gguf import read_headers

    for first in ("tiny-glm-UD-TQ1_0.gguf", "UD-Q2_K_XL/tiny-glm-UD-Q2_K_XL-00001-of-00002.gguf"):
        metadata = read_headers(published[0] / "tiny-glm" / first)[0].metadata
        assert {
            k: metadata.get(f"general.{k}")
            for k in ("name", "basename", "size_label", "license", "languages", "tags")
        } == {
            "name": "tiny-glm",
            "basename": "tiny-glm",
            "size_label": "8x4.5M",
            "license": "apache-2.0",
            "languages": ["en"],
            "tags": ["gguf", "imatrix", "conversational", "text-generation"],
        }
        assert {k.rpartition(".")[2] for k in metadata if k.startswith("general.sampling.")} == {
            "temp",
            "top_p",
            "top_k",
            "min_p",
            "penalty_repeat",
        }
        assert not [k for k, v in metadata.items() if isinstance(v, str) and str(published[0]) in v]
