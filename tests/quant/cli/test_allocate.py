"""`quant allocate`: what it prints and writes, and what it refuses before any costly work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from quant.calibration.hessian_file import FORM
from quant.core import files
from quant.evaluate import error_measurement
from quant.llama.toolchain import find_toolchain
from quant.plan import error_table, sensitivity
from quant.plan.load import load_variant
from quant.plan.plan import make_plan
from quant.plan.sensitivity import Sensitivities
from tests.quant.cli.conftest import Run
from tests.quant.plan.test_allocate import GLM
from tests.quant.quantize.engine.models import write_base, write_matrix


def test_a_model_without_weights_is_allocated_by_priors_that_are_named(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "variant.toml"
    code, text, err = run(
        "allocate", "glm-4.6", "--size", "135GB", "--name", "MINE", "-o", out, "--json"
    )
    assert code == 0
    assert "Thireus, GGUF Tool Suite" in err
    assert "Thireus, GGUF Tool Suite" in out.read_text()
    assert "not measured on this model" in out.read_text()
    [variant] = json.loads(text)["variants"]
    plan = make_plan(load_variant(str(out)), GLM.tensors)
    assert variant["name"] == plan.variant.name == "MINE"
    assert variant["bytes"] == GLM.forecast_bytes(plan)
    assert 0.998 * 135e9 <= variant["bytes"] <= 135e9
    assert variant["gap"] <= 1e-3


def test_several_sizes_are_a_ladder_of_files(run: Run, tmp_path: Path) -> None:
    sizes = ("--size", "4MB", "--size", "6 MB")
    code, text, _ = run("allocate", "tiny-glm", *sizes, "-o", tmp_path / "out")
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ALLOCATED-4MB.toml",
        "ALLOCATED-6MB.toml",
    ]
    assert "ALLOCATED-4MB" in text


def test_a_ladder_has_the_sizes_and_settings_of_the_shipped_variants(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text, _ = run("allocate", "tiny-glm", "--ladder", "-o", out, "--json")
    assert code == 0
    variants = {v["name"]: v for v in json.loads(text)["variants"]}
    assert {p.stem for p in out.iterdir()} == variants.keys() >= {"UD-TQ1_0", "UD-Q5_K_XL"}
    for name, v in variants.items():
        assert 0.99 * v["target"] <= v["bytes"] <= v["target"]
        allocated, shipped = load_variant(str(out / f"{name}.toml")), load_variant(name)
        assert replace(allocated, rules=(), file_type="") == replace(
            shipped, rules=(), file_type=""
        )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "expected one of --size, --bpw, --fits and --ladder"),
        (["--size", "4MB", "--bpw", "4"], "expected one of --size, --bpw, --fits and --ladder"),
        (["--size", "4MB", "--pin", "x"], "--pin: expected REGEX=TYPE"),
        (["--size", "4MB", "--exclude", "Q4_Q"], "did you mean"),
        (["--size", "4MB", "--type", "Q4_Q"], "did you mean"),
        (["--size", "1MB"], "bytes for these types, found 1,000,000"),
        (["--fits", "a phone"], "expected a text like '24GB gpu"),
        (["--size", "4MB", "--name", 'a"b'], "name: expected letters, digits"),
        (["--size", "4MB", "--name", "../up"], "name: expected letters, digits"),
    ],
)
def test_a_wrong_call_is_refused_and_writes_nothing(
    run: Run, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    code, _, err = run("allocate", "tiny-glm", *arguments, "-o", tmp_path / "x.toml")
    assert code == 2
    assert problem in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--measured", "--hessians", "--moments"])
def test_a_model_without_weights_has_nothing_to_build(
    run: Run, tmp_path: Path, option: str
) -> None:
    (tmp_path / "9").touch()
    value = 9 if option == "--measured" else tmp_path / "9"
    asked = ("allocate", "glm-4.6", "--size", "100GB", option, value, "-o", tmp_path / "v.toml")
    code, _, err = run(*asked)
    assert (code, "expected a BF16 GGUF" in err) == (2, True)


@pytest.mark.tools
def test_a_size_out_of_reach_is_refused_before_anything_is_probed(run: Run, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    matrix = write_matrix(tmp_path / "imatrix.gguf", base)
    assert find_toolchain().bin.is_dir()
    work = tmp_path / "work"
    options = ["--imatrix", matrix, "--size", "1kB", "-o", tmp_path / "x.toml", "--work", work]
    code, _, err = run("allocate", base, *options, "--type", "Q4_K", "--type", "Q8_0")
    assert (code, "found 1,000" in err) == (2, True)
    assert [p.name for p in work.iterdir()] == ["errors.json"]


def write_hessians(path: Path, base: Path, digest: str | None = None) -> Path:
    """Write a Hessian file without Hessians, which names its base."""
    about = {"form": FORM, "base": digest or files.hash_file(base)}
    save_file({}, path, {"moments": json.dumps(about)})
    return path


def test_measurements_with_and_without_error_compensation_are_not_mixed(
    run: Run, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base.gguf")
    hessians = write_hessians(tmp_path / "m", base)
    asked = ("allocate", base, "--size", "900kB", "-o", tmp_path / "v.toml", "--text", __file__)
    stranger = write_hessians(tmp_path / "o", base, "0" * 64)
    code, _, err = run(*asked, "--hessians", stranger)
    assert code == 2 and "of another model" in err

    kept = ("--errors", tmp_path / "errors.json", "--sensitivity", tmp_path / "s.json")
    table = error_measurement.measure_errors(base, None, find_toolchain(), types=("Q4_K", "Q8_0"))
    error_table.write_error_table(tmp_path / "errors.json", table)
    code, _, err = run(*asked, *kept, "--hessians", hessians)
    assert code == 2 and "expected errors measured with error compensation by" in err
    assert "found ggml's rounding" in err

    compensated = replace(table, hessians=files.hash_file(hessians))
    error_table.write_error_table(tmp_path / "errors.json", compensated)
    code, _, err = run(*asked, *kept)
    assert code == 2 and "expected errors measured with ggml's rounding" in err

    uncompensated = Sensitivities(table.base, "probes", dict.fromkeys(table.errors, 1.0))
    sensitivity.write_sensitivities(tmp_path / "s.json", uncompensated)
    code, _, err = run(*asked, *kept, "--hessians", hessians)
    expected = f"expected probes fed back by {files.hash_file(hessians)[:12]}, found probes"
    assert code == 2 and expected in err
