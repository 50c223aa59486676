"""The flow as a person runs it: a real server, a worker, the deployments, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quant.plan.load import RECIPES
from tests.flows.conftest import Prefect, until

pytestmark = [pytest.mark.prefect, pytest.mark.tools]

VARIANT = "UD-Q2_K_XL"
DEPLOYMENT = "quantize/tiny-glm"
BUILD_SECONDS = 900


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def cancelled(prefect: Prefect, out: Path) -> str:
    """A run that was cancelled while llama-imatrix was at work."""
    code, output, run = prefect.run(DEPLOYMENT, *parameters(out), seconds=120)
    assert code == 0, output
    until(
        lambda: prefect.running("llama-imatrix") or not alive(prefect, run),
        BUILD_SECONDS,
        "llama-imatrix",
    )
    assert prefect.running("llama-imatrix"), prefect.state(run)["message"]
    code, output = prefect.say("flow-run", "cancel", run)
    assert code == 0, output
    until(lambda: not alive(prefect, run), 120, "the end of the run")
    return run


@pytest.fixture(scope="module")
def released(prefect: Prefect, out: Path, cancelled: str) -> str:
    """The run after it, which was left to its end."""
    converted = kept(out, "convert")
    code, output, run = prefect.run(DEPLOYMENT, "--watch", *parameters(out), seconds=BUILD_SECONDS)
    assert code == 0, f"{output}\n{prefect.state(run)['message']}"
    assert kept(out, "convert") == converted, "the conversion was done again"
    return run


def parameters(out: Path) -> list[str]:
    return ["--param", f"out={out}", "--param", f'variants=["{VARIANT}"]']


def alive(prefect: Prefect, run: str) -> bool:
    return prefect.state(run)["type"] in ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING")


def kept(out: Path, stage: str) -> dict[str, int]:
    """The finished work of a stage, with the time at which it was finished."""
    receipts = (out / ".work" / "tiny-glm" / stage).glob("*/receipt.json")
    return {p.parent.name: p.stat().st_mtime_ns for p in receipts}


def contents(release: Path) -> dict[str, bytes]:
    return {
        p.relative_to(release).as_posix(): p.read_bytes() for p in release.rglob("*") if p.is_file()
    }


def test_a_cancelled_run_leaves_no_tool_running(
    prefect: Prefect, out: Path, cancelled: str
) -> None:
    assert prefect.state(cancelled)["type"] == "CANCELLED"
    assert prefect.running("llama-") == {}
    assert not (out / "tiny-glm").exists()
    assert len(kept(out, "convert")) == 1


def test_the_next_run_continues_there_and_leaves_the_release(
    prefect: Prefect, out: Path, released: str
) -> None:
    assert prefect.state(released)["type"] == "COMPLETED"
    manifest = json.loads((out / "tiny-glm" / "manifest.json").read_text())
    assert [v["name"] for v in manifest["variants"]] == [VARIANT]
    assert all(
        (out / "tiny-glm" / f["path"]).stat().st_size == f["bytes"]
        for f in manifest["variants"][0]["files"]
    )


def test_every_stage_is_a_task_named_after_its_subject(prefect: Prefect, released: str) -> None:
    tasks = sorted(prefect.of_run("task_runs", released), key=lambda t: t["start_time"])
    assert [t["name"] for t in tasks] == [
        "source tiny-glm",
        "template glm-4.6",
        "convert tiny-glm",
        "calibrate embedded",
        "imatrix tiny-glm",
        f"plan {VARIANT}",
        f"quantize {VARIANT}",
        f"smoke {VARIANT}",
        f"evaluate {VARIANT}",
        "package tiny-glm",
        "deliver tiny-glm",
    ]
    assert {t["state_type"] for t in tasks} == {"COMPLETED"}


def test_the_plan_is_a_table_of_types_whose_bytes_add_up(
    prefect: Prefect, out: Path, released: str
) -> None:
    artifact = artifacts(prefect, released)["plan-ud-q2-k-xl"]
    (variant,) = json.loads((out / "tiny-glm" / "manifest.json").read_text())["variants"]
    rows = json.loads(artifact["data"])
    assert {row["type"]: row["bytes"] for row in rows} == variant["bytes_by_type"]
    assert sum(row["tensors"] for row in rows) == len(variant["tensors"])
    assert artifact["description"].startswith(f"{VARIANT}: ")


def test_the_experts_coverage_is_a_table(prefect: Prefect, out: Path, released: str) -> None:
    artifact = artifacts(prefect, released)["imatrix-tiny-glm"]
    manifest = json.loads((out / "tiny-glm" / "manifest.json").read_text())
    rows = json.loads(artifact["data"])
    assert [row["layer"] for row in rows if row["experts"] == "8"] == ["1", "2", "3"]
    assert (
        min(int(row["least"].replace(",", "")) for row in rows)
        == manifest["imatrix"]["coverage"]["least_tokens"]
    )
    assert manifest["imatrix"]["sha256"] in artifact["description"]


def test_the_conversation_is_there_to_read(prefect: Prefect, released: str) -> None:
    text = artifacts(prefect, released)["smoke-ud-q2-k-xl"]["data"]
    assert text.startswith("# tiny-glm-UD-Q2_K_XL")
    assert ": passed\n" in text.splitlines(keepends=True)[0]
    assert "**Hello! My name is Eve.**" in text
    assert "Paris" in text


def test_figures_are_a_table_of_the_whole_and_of_every_domain(
    prefect: Prefect, out: Path, released: str
) -> None:
    artifact = artifacts(prefect, released)["evaluate-ud-q2-k-xl"]
    manifest = json.loads((out / "tiny-glm" / "manifest.json").read_text())
    evaluation = manifest["variants"][0]["evaluation"]
    rows = {row["domain"]: row for row in json.loads(artifact["data"])}
    assert {name: row["KLD"] for name, row in rows.items()} == {
        name: f["kld_mean"] for name, f in {"all": evaluation, **evaluation["domains"]}.items()
    }
    assert rows["all"]["95 %"] == f"{evaluation['kld_mean_low']} to {evaluation['kld_mean_high']}"
    short = ", ".join(manifest["evaluation"]["too_short"])
    assert f"not measured, too little held-out text: {short}" in artifact["description"]


def test_a_file_that_does_not_pass_stops_the_run_and_its_conversation_is_there_to_read(
    prefect: Prefect, out: Path, released: str, tmp_path: Path
) -> None:
    """The work of the run before is found again, so only the talk is new."""
    text = (RECIPES / "models" / "tiny-glm.toml").read_text()
    folder = f'folder = "{RECIPES / "models" / "tiny-glm"}"'
    text = text.replace('folder = "tiny-glm"', folder).replace(
        '"<|observation|>", ', '"<|system|>", '
    )
    (tmp_path / "m.toml").write_text(text)
    recipe = f"model={tmp_path / 'm.toml'}"
    code, output, run = prefect.run(
        DEPLOYMENT, "--watch", "--param", recipe, *parameters(out), seconds=BUILD_SECONDS
    )
    assert code == 1, output
    assert "end of turn: expected <|system|> to end an answer too" in prefect.state(run)["message"]
    conversation = artifacts(prefect, run)["smoke-ud-q2-k-xl"]["data"]
    assert (
        conversation.startswith("# tiny-glm-UD-Q2_K_XL")
        and "FAILED" in conversation.splitlines()[0]
    )
    assert "**Hello! My name is Eve.**" in conversation


def test_the_release_is_a_table(prefect: Prefect, out: Path, released: str) -> None:
    artifact = artifacts(prefect, released)["release-tiny-glm"]
    (row,) = json.loads(artifact["data"])
    assert row["variant"] == VARIANT
    assert row["smoke test"].startswith("passed")
    assert artifact["description"] == f"Release in {out / 'tiny-glm'}"


def artifacts(prefect: Prefect, run: str) -> dict[str, dict[str, str]]:
    return {a["key"]: a for a in prefect.of_run("artifacts", run)}


def test_the_command_line_makes_the_same_bytes(out: Path, released: str, tmp_path: Path) -> None:
    quant = Path(sys.executable).with_name("quant")
    line = [str(quant), "build", "tiny-glm", "--out", str(tmp_path), "--variant", VARIANT]
    done = subprocess.run(line, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "tiny-glm") == contents(out / "tiny-glm")


def test_a_wrong_name_fails_the_run_with_one_line_that_suggests_the_right_one(
    prefect: Prefect, tmp_path: Path
) -> None:
    code, _, run = prefect.run(
        DEPLOYMENT,
        "--watch",
        "--param",
        'variants=["UD-Q2_K_XK"]',
        "--param",
        f"out={tmp_path}",
        seconds=180,
    )
    message = "InputError: variant 'UD-Q2_K_XK' is not known: did you mean 'UD-Q2_K_XL'?"
    assert code == 1
    assert prefect.state(run)["type"] == "FAILED"
    assert prefect.state(run)["message"] == f"Flow run encountered an exception: {message}"
    logs = prefect.ask("logs", logs={"flow_run_id": {"any_": [run]}})
    assert any(log["message"].rstrip().endswith(message) for log in logs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("variants=7", "Validation failed for field 'variants'"),
        ("revision=[1]", "Validation failed for field 'revision'"),
        ('variant=["Q4_1"]', "The following parameters are available on the deployment"),
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused_before_anything_is_scheduled(
    prefect: Prefect, parameter: str, message: str
) -> None:
    before = {r["id"] for r in prefect.ask("flow_runs")}
    code, output, _ = prefect.run(DEPLOYMENT, "--param", parameter, seconds=120)
    assert code == 1
    assert message in " ".join(output.split())
    assert {r["id"] for r in prefect.ask("flow_runs")} == before


def test_every_shipped_deployment_runs_the_flow_from_this_folder(prefect: Prefect) -> None:
    deployments = {d["name"]: d for d in prefect.ask("deployments")}
    assert set(deployments) == {"tiny-glm", "glm-4.6"}
    for name, deployment in deployments.items():
        (step,) = deployment["pull_steps"]
        assert step == {
            "prefect.deployments.steps.set_working_directory": {"directory": str(RECIPES.parent)}
        }
        assert deployment["parameters"] == {"model": name} | (
            {"publish": False} if name == "tiny-glm" else {}
        )
        assert (RECIPES / "models" / f"{name}.toml").is_file()


def test_no_request_leaves_the_machine(
    prefect: Prefect, outside: tuple[str, list[str]], released: str
) -> None:
    assert prefect.api.get("/admin/settings").json()["server"]["analytics_enabled"] is False
    assert outside[1] == []
