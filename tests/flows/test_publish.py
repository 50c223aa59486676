"""Publishing from a deployment: the form's parameters, approval by pause and resume, and a token that nobody finds again."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run as call

import pytest

from tests import hub as hubs
from tests.flows.conftest import ROOT, Prefect, until
from tests.hub import Hub

pytestmark = [pytest.mark.prefect, pytest.mark.tools]

TOKEN = "hf_PlantedTokenOfTheDeployment"
SECRET = "the-hubs-token"
REPO = "somebody/tiny-glm-GGUF"
VARIANT = "UD-TQ1_0"
SECONDS = 900
SAVE = f"from prefect.blocks.system import Secret; Secret(value='{TOKEN}').save('{SECRET}')"


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hubs.running(tmp_path_factory.mktemp("hub")) as running:
        running.tokens[TOKEN] = "write"
        yield running


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def secret(prefect: Prefect) -> str:
    """A secret block with the token, as a person would make one in Prefect's page."""
    done = call(
        [sys.executable, "-c", SAVE],
        env=prefect.env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return SECRET


def parameters(the_hub: Hub, out: Path, secret: str, **more: object) -> list[str]:
    given = {
        "publish": True,
        "repo": REPO,
        "token_secret": secret,
        "out": str(out),
        "variants": [VARIANT],
        **more,
    }
    env = {
        "DO_NOT_TRACK": "1",
        "HF_ENDPOINT": the_hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return ["--params", json.dumps(given), "--job-variable", f"env={json.dumps(env)}"]


@pytest.fixture(scope="module")
def rehearsed(prefect: Prefect, the_hub: Hub, out: Path, secret: str) -> str:
    """A dry run."""
    asked = parameters(the_hub, out, secret, dry_run=True)
    code, output, run = prefect.run("quantize/tiny-glm", "--watch", *asked, seconds=SECONDS)
    assert code == 0, f"{output}\n{prefect.state(run)['message']}"
    return run


@pytest.fixture(scope="module")
def waiting(prefect: Prefect, the_hub: Hub, out: Path, secret: str, rehearsed: str) -> str:
    """A run that waits for approval."""
    code, output, run = prefect.run(
        "quantize/tiny-glm", *parameters(the_hub, out, secret, approve=True), seconds=120
    )
    assert code == 0, output
    until(
        lambda: prefect.state(run)["type"] not in ("SCHEDULED", "PENDING", "RUNNING"),
        SECONDS,
        "the pause",
    )
    return run


def test_a_dry_run_says_what_would_change_and_changes_nothing(
    prefect: Prefect, the_hub: Hub, rehearsed: str
) -> None:
    change = artifacts(prefect, rehearsed)["publish-somebody-tiny-glm-gguf-change"]
    assert f"{REPO} (to be made, public): one commit" in change
    assert "add    tiny-glm-UD-TQ1_0.gguf" in change
    assert {r.method for r in the_hub.requests[: _first_post(the_hub)]} == {"GET"}


def test_a_run_with_approval_pauses_before_anything_is_published(
    prefect: Prefect, the_hub: Hub, waiting: str
) -> None:
    assert prefect.state(waiting)["type"] == "PAUSED"
    assert the_hub.repos == {}
    assert (
        "add    tiny-glm-UD-TQ1_0.gguf"
        in artifacts(prefect, waiting)["publish-somebody-tiny-glm-gguf-change"]
    )


def test_a_run_that_is_resumed_publishes_the_release_in_one_commit(
    prefect: Prefect, the_hub: Hub, out: Path, waiting: str
) -> None:
    # A busy server answers 503 while its database is locked.
    resume = f"/flow_runs/{waiting}/resume"
    until(lambda: prefect.api.post(resume, json={}).is_success, SECONDS, "the run is resumed")
    until(
        lambda: prefect.state(waiting)["type"] not in ("SCHEDULED", "PENDING", "RUNNING", "PAUSED"),
        SECONDS,
        "the end",
    )
    assert prefect.state(waiting)["type"] == "COMPLETED", prefect.state(waiting)["message"]
    files = {
        p.relative_to(out / "tiny-glm").as_posix(): p.read_bytes()
        for p in (out / "tiny-glm").rglob("*")
        if p.is_file()
    }
    head = the_hub.head(REPO).files
    assert {
        n: the_hub.object(b.sha256).read_bytes() for n, b in head.items() if n != ".gitattributes"
    } == files
    assert len(the_hub.repos[REPO].commits) == 2  # the first is the hub's own
    link = artifacts(prefect, waiting)["publish-somebody-tiny-glm-gguf"]
    assert f"{the_hub.url}/{REPO}/tree/release-" in link


def test_the_flows_parameters_are_a_form_with_a_description_for_each_field(
    prefect: Prefect,
) -> None:
    deployments = {d["name"]: d for d in prefect.ask("deployments")}
    form = deployments["glm-4.6"]["parameter_openapi_schema"]["properties"]
    boxes = ("publish", "private", "pull_request", "dry_run", "approve")
    assert {form[k].get("type", "choice") for k in boxes} == {"boolean"}
    assert {"variants", "repo", "token_secret", "revision"} <= form.keys()
    assert all(field.get("description") for field in form.values())
    assert form["publish"]["default"] is True
    assert deployments["tiny-glm"]["parameters"]["publish"] is False


def test_the_token_is_in_no_log_no_artifact_and_nowhere_in_prefects_database(
    prefect: Prefect, the_hub: Hub, out: Path, waiting: str
) -> None:
    """The block itself is there, encrypted."""
    assert {r.token for r in the_hub.requests} >= {f"Bearer {TOKEN}"}
    read = 0
    for folder in (prefect.home, out, the_hub.folder):
        for path in folder.rglob("*"):
            if path.is_file():
                assert TOKEN.encode() not in path.read_bytes(), path
                read += path.stat().st_size
    assert (prefect.home / ".prefect" / "prefect.db").is_file()
    assert read > 10**6
    for kind in ("flow_runs", "task_runs", "artifacts", "logs"):
        assert TOKEN not in json.dumps(prefect.ask(kind)), kind


def artifacts(prefect: Prefect, run: str) -> dict[str, str]:
    return {a["key"]: str(a["data"]) for a in prefect.of_run("artifacts", run)}


def _first_post(the_hub: Hub) -> int:
    return next(
        (n for n, r in enumerate(the_hub.requests) if r.method != "GET"), len(the_hub.requests)
    )
