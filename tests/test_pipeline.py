"""The whole way on the trained tiny model, through the command line, as a person would go it."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quant.core.files import hash_file
from quant.llama.gguf import read_header, read_headers
from quant.llama.toolchain import find_toolchain
from quant.plan.load import RECIPES, list_recipes, load_model
from quant.quantize.shard import merge_shards

pytestmark = pytest.mark.tools

QUANT = Path(sys.executable).with_name("quant")
SOME = ("-v", "UD-TQ1_0", "-v", "UD-Q2_K_XL", "-v", "Q4_1")
TINY = RECIPES / "models" / "tiny-glm"
SECONDS = 900


def run(*args: str | Path, **kw: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [QUANT, *args], capture_output=True, text=True, timeout=SECONDS, check=False, **kw
    )


def contents(release: Path) -> dict[str, bytes]:
    return {
        p.relative_to(release).as_posix(): p.read_bytes()
        for p in sorted(release.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with everything; its release folder."""
    out = tmp_path_factory.mktemp("ladder")
    done = run("demo", "--out", out)
    assert done.returncode == 0, done.stderr
    return out / "tiny-glm"


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with three variants; the folder that it was told."""
    out = tmp_path_factory.mktemp("some")
    done = run("demo", "--out", out, *SOME)
    assert done.returncode == 0, done.stderr
    return out


def test_the_demo_makes_all_twelve_files_and_every_one_passed_its_smoke_test(ladder: Path) -> None:
    manifest = json.loads((ladder / "manifest.json").read_text())
    assert [v["name"] for v in manifest["variants"]] == list(load_model("tiny-glm")[0].variants)
    assert len(manifest["variants"]) == 12
    for variant in manifest["variants"]:
        assert variant["smoke"] and all(
            s["passed"] for s in variant["smoke"] if s["kind"] == "protocol"
        ), variant["name"]
        assert all((ladder / f["path"]).stat().st_size == f["bytes"] for f in variant["files"])


def test_the_checksums_hold(ladder: Path) -> None:
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"],
        cwd=ladder,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    listed = {line.split("  ")[1] for line in (ladder / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(contents(ladder)) - {"SHA256SUMS", "manifest.json"}


def test_the_file_for_ollama_is_one_file_at_the_root_without_the_ternary_type(ladder: Path) -> None:
    header = read_header(ladder / "tiny-glm-UD-TQ1_0.gguf")
    assert "split.count" not in header.metadata
    assert not {t.type.name for t in header.tensors} & {"TQ1_0", "TQ2_0"}


def test_types_in_the_files_are_those_of_the_manifest(ladder: Path) -> None:
    for variant in json.loads((ladder / "manifest.json").read_text())["variants"]:
        headers = read_headers(ladder / variant["files"][0]["path"])
        found = {t.name: t.type.name for h in headers for t in h.tensors}
        assert found == {name: t["type"] for name, t in variant["tensors"].items()}


def test_digests_of_the_calibration_text_and_the_importance_matrix_stand_in_the_manifest(
    ladder: Path,
) -> None:
    manifest = json.loads((ladder / "manifest.json").read_text())
    matrix, text = manifest["imatrix"], manifest["calibration"]
    assert matrix["sha256"] == hash_file(ladder / matrix["path"])
    assert (
        matrix["made_of"]["text"] == text["sha256"]
        and matrix["made_of"]["base"] == manifest["base"]["sha256"]
    )
    made = next((ladder.parent / ".work").glob("*/calibrate/*/calibration.txt"))
    assert text["sha256"] == hash_file(made)
    assert matrix["coverage"]["unvisited"] == {} and text["held_out"] > 0
    assert {s["licence"] for s in text["sources"]} == {"Apache-2.0"}


def test_the_statement_of_origin_names_text_matrix_and_how_llama_cpp_was_built(
    ladder: Path,
) -> None:
    manifest = json.loads((ladder / "manifest.json").read_text())
    origin = json.loads((ladder / "provenance.json").read_text())["predicate"]["buildDefinition"]
    digests = {
        d["name"]: d["digest"]["sha256"] for d in origin["resolvedDependencies"] if "name" in d
    }
    assert digests["calibration/embedded"] == manifest["calibration"]["sha256"]
    assert digests[manifest["imatrix"]["path"]] == hash_file(ladder / manifest["imatrix"]["path"])
    assert origin["internalParameters"]["llama.cpp"] == {
        "version": manifest["llama.cpp"],
        **find_toolchain().build_info,
    }


def test_shards_merge_back_into_a_file_with_the_digests_of_the_unsplit_one(
    ladder: Path, tmp_path: Path
) -> None:
    manifest = json.loads((ladder / "manifest.json").read_text())
    sharded = [v for v in manifest["variants"] if len(v["files"]) > 1]
    assert len(sharded) >= 5
    for variant in sharded:
        merged = tmp_path / f"{variant['name']}.gguf"
        merge_shards(ladder / variant["files"][0]["path"], merged, find_toolchain())
        assert read_header(merged).hash_tensors() == {
            name: t["sha256"] for name, t in variant["tensors"].items()
        }


def test_no_path_of_this_machine_is_published(ladder: Path) -> None:
    for name, data in contents(ladder).items():
        assert str(ladder.parent).encode() not in data, name
        assert b"/convert/" not in data and b".partial" not in data, name


def test_another_folder_gets_the_same_bytes_and_the_same_manifest(
    some: Path, tmp_path: Path
) -> None:
    assert run("demo", "--out", tmp_path, *SOME).returncode == 0
    assert contents(tmp_path / "tiny-glm") == contents(some / "tiny-glm")


def test_the_same_folder_again_does_nothing_and_says_so(some: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns
        for p in some.rglob("*")
        if p.is_file() and p.name not in ("lock", "held-by")
    }
    again = run("demo", "--out", some, *SOME)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(some: Path, tmp_path: Path) -> None:
    killed = []
    for stage in (
        "source",
        "template",
        "convert",
        "calibrate",
        "imatrix",
        "plan",
        "quantize",
        "smoke",
        "package",
    ):
        process = subprocess.Popen(
            [QUANT, "demo", "--out", tmp_path, *SOME], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if f"] {stage} " in line:  # it is done, and the next stage has begun
                process.send_signal(signal.SIGKILL)
                killed.append(stage)
                break
        process.wait()
        process.stderr.close()
        assert not (tmp_path / "tiny-glm").exists() or stage == "package"
    assert len(killed) == 9
    done = run("demo", "--out", tmp_path, *SOME)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "tiny-glm") == contents(some / "tiny-glm")


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [QUANT, "demo", "--out", tmp_path, *SOME], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "run the same command again" in said
    assert "Traceback" not in said


# ---- bad input: one line that names it, exit code 2, nothing half-made under a final name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINY, folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path) -> Path:
    text = (RECIPES / "models" / "tiny-glm.toml").read_text()
    path = tmp_path / "model.toml"
    path.write_text(re.sub(r"^folder = .*$", f'folder = "{checkpoint}"', text, flags=re.MULTILINE))
    return path


def assert_refused(done: subprocess.CompletedProcess[str], out: Path, *said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback (most recent call last)" not in done.stderr.split("end of the log")[0]
    for words in said:
        assert words in done.stderr
    assert not [p for p in out.glob("*") if p.name != ".work"]
    whole = [p for p in out.rglob("*.gguf") if ".partial" not in str(p)]
    assert all((p.parent / "receipt.json").exists() for p in whole)


def test_a_folder_without_config_json_is_refused(
    recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "config.json").unlink()
    assert_refused(
        run("build", recipe, "-o", tmp_path / "out"), tmp_path / "out", "config.json: missing"
    )


def test_a_template_that_breaks_at_the_second_turn_stops_a_build_before_anything_is_converted(
    recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text().replace('template = "glm-4.6"', 'template = "none"'))
    stopped = run("build", recipe, "-o", tmp_path / "out")
    assert stopped.returncode == 1, stopped.stderr
    assert (
        "conversation 'raw reasoning, two turns' (jinja), thinking default, prompt 3: past stays"
        in stopped.stderr
    )
    assert "found 12 that fail" in stopped.stderr
    assert not list((tmp_path / "out").rglob("*.gguf"))


def test_weights_that_can_carry_code_are_refused(
    recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert_refused(
        run("build", recipe, "-o", tmp_path / "out"),
        tmp_path / "out",
        "*.safetensors",
        "pytorch_model.bin",
    )


def test_a_truncated_safetensors_file_is_refused_with_both_lengths(
    recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    refused = run("build", recipe, "-o", tmp_path / "out")
    assert_refused(refused, tmp_path / "out", "model.safetensors", str(size), str(size - 1))


def test_an_unknown_variant_is_named_with_its_neighbour(tmp_path: Path) -> None:
    refused = run("demo", "-o", tmp_path / "out", "-v", "UD-Q2_KXL", "-v", "Q4_2")
    assert_refused(refused, tmp_path / "out", "'UD-Q2_KXL'", "'UD-Q2_K_XL'", "'Q4_2'")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20, 4 * 2**20))

    refused = run("demo", "-o", out, *SOME, preexec_fn=little_room)
    assert_refused(refused, out, "too large")
    assert run("demo", "-o", out, "-v", "UD-TQ1_0").returncode == 0  # and with room, it goes on


def test_a_missing_tool_is_named_with_what_brings_it(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("llama-quantize", "llama-tokenize", "llama-imatrix", "llama-server"):
        (tools / tool).symlink_to(find_toolchain().bin / tool)
    refused = run("demo", "-o", tmp_path / "out", "--llama-cpp", tools)
    assert_refused(refused, tmp_path / "out", "llama-gguf-split: tool missing", "uv sync")


def test_a_tool_that_fails_is_quoted(some: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("llama-quantize", "llama-tokenize", "llama-gguf-split", "llama-server"):
        (tools / tool).symlink_to(find_toolchain().bin / tool)
    (tools / "llama-imatrix").write_text("#!/bin/sh\necho 'the sky fell down'; exit 7\n")
    (tools / "llama-imatrix").chmod(0o755)
    refused = run("demo", "-o", tmp_path / "out", "-v", "Q4_1", "--llama-cpp", tools)
    assert_refused(refused, tmp_path / "out", "llama-imatrix exited with 7", "the sky fell down")


def test_a_taken_port_is_refused(some: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run("smoke", some / "tiny-glm" / "tiny-glm-UD-TQ1_0.gguf", "--port", str(port))
    assert refused.returncode == 2
    assert f"port {port}" in refused.stderr and "taken" in refused.stderr


def test_two_runs_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [QUANT, "demo", "--out", tmp_path, *SOME], stderr=subprocess.PIPE, text=True
    )
    assert first.stderr is not None
    first.stderr.readline()
    second = run("demo", "--out", tmp_path, *SOME)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"process {first.pid}" in second.stderr


def test_every_variant_that_is_shipped_is_in_some_release() -> None:
    used = {name for model in list_recipes("models") for name in load_model(model)[0].variants}
    assert used | {"UD-Q8_K_XL", "Q8_0"} == set(list_recipes("variants"))
