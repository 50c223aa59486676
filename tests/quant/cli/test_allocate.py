"""`quant allocate` and `quant evaluate`: what they print and refuse, and that nothing costly begins before it is refused."""

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
from tests.quant.plan.test_budgets import GLM
from tests.quant.quantize.engine.models import write_base, write_matrix


def test_a_model_without_weights_is_allocated_by_priors_that_say_so(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "variant.toml"
    code, said, err = run(
        "allocate", "glm-4.6", "--size", "135GB", "--name", "MINE", "-o", out, "--json"
    )
    assert code == 0
    assert "Thireus, GGUF Tool Suite" in err
    assert "Thireus, GGUF Tool Suite" in out.read_text()
    assert "not measured on this model" in out.read_text()
    [told] = json.loads(said)["variants"]
    planned = make_plan(load_variant(str(out)), GLM.tensors)
    assert told["name"] == planned.variant.name == "MINE"
    assert told["bytes"] == GLM.file_bytes(planned)
    assert 0.998 * 135e9 <= told["bytes"] <= 135e9
    assert told["gap"] <= 1e-3


def test_several_sizes_are_a_ladder_of_files(run: Run, tmp_path: Path) -> None:
    code, said, _ = run(
        "allocate", "tiny-glm", "--size", "4MB", "--size", "6MB", "-o", tmp_path / "out"
    )
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ALLOCATED-4MB.toml",
        "ALLOCATED-6MB.toml",
    ]
    assert "ALLOCATED-4MB" in said


def test_a_ladder_has_the_sizes_and_the_manners_of_the_shipped_variants(
    run: Run, tmp_path: Path
) -> None:
    code, said, _ = run("allocate", "tiny-glm", "--ladder", "-o", tmp_path / "out", "--json")
    assert code == 0
    told = {v["name"]: v for v in json.loads(said)["variants"]}
    assert (
        {p.stem for p in (tmp_path / "out").iterdir()} == told.keys() >= {"UD-TQ1_0", "UD-Q5_K_XL"}
    )
    for name, v in told.items():
        assert 0.99 * v["target"] <= v["bytes"] <= v["target"]
        assert (
            load_variant(str(tmp_path / "out" / f"{name}.toml")).split == load_variant(name).split
        )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "expected one of --size, --bpw, --fits and --ladder"),
        (["--size", "4MB", "--bpw", "4"], "expected one of --size, --bpw, --fits and --ladder"),
        (["--size", "4MB", "--pin", "x"], "--pin: expected REGEX=TYPE"),
        (["--size", "4MB", "--exclude", "Q4_Q"], "did you mean"),
        (["--size", "1MB"], "bytes for these types, found 1,000,000"),
        (["--fits", "a phone"], "expected a text like '24GB gpu"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    run: Run, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    code, _, err = run("allocate", "tiny-glm", *arguments, "-o", tmp_path / "x.toml")
    assert code == 2
    assert problem in err
    assert not (tmp_path / "x.toml").exists()


@pytest.mark.tools
def test_a_size_out_of_reach_is_refused_before_anything_is_probed(run: Run, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    matrix = write_matrix(tmp_path / "imatrix.gguf", base)
    assert find_toolchain().bin.is_dir()
    options = [
        "--imatrix",
        matrix,
        "--size",
        "1kB",
        "-o",
        tmp_path / "x.toml",
        "--work",
        tmp_path / "work",
    ]
    code, _, err = run("allocate", base, *options, "--type", "Q4_K", "--type", "Q8_0")
    assert (code, "found 1,000" in err) == (2, True)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["errors.json"]


def moments_of(base: Path, path: Path, digest: str | None = None) -> Path:
    """Moments of nothing, which say whose they are."""
    about = {"form": FORM, "base": digest or files.hash_file(base)}
    save_file({}, path, {"moments": json.dumps(about)})
    return path


def test_what_was_measured_otherwise_is_not_taken_for_what_is_fed_back(
    run: Run, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base.gguf")
    seen, other = moments_of(base, tmp_path / "m"), moments_of(base, tmp_path / "o", "0" * 64)
    asked = ("allocate", base, "--size", "900kB", "-o", tmp_path / "v.toml", "--text", __file__)
    code, _, err = run(*asked, "--moments", other)
    assert code == 2 and "of another model" in err
    kept = ("--errors", tmp_path / "errors.json", "--sensitivity", tmp_path / "s.json")
    found = error_measurement.measure_errors(base, None, find_toolchain(), types=("Q4_K", "Q8_0"))
    error_table.write_error_table(tmp_path / "errors.json", found)
    code, _, err = run(*asked, *kept, "--moments", seen)
    assert (
        code == 2
        and "expected what was measured fed back by moments" in err
        and "found with ggml's rounding" in err
    )
    error_table.write_error_table(
        tmp_path / "errors.json", replace(found, moments=files.hash_file(seen))
    )
    code, _, err = run(*asked, *kept)
    assert code == 2 and "expected what was measured with ggml's rounding" in err
    sensitivity.write_sensitivities(
        tmp_path / "s.json", Sensitivities(found.base, "probes", dict.fromkeys(found.errors, 1.0))
    )
    code, _, err = run(*asked, *kept, "--moments", seen)
    assert (
        code == 2
        and f"expected probes fed back by {files.hash_file(seen)[:12]}, found probes" in err
    )
    code, _, err = run(
        "allocate", "tiny-glm", "--size", "4MB", "--moments", seen, "-o", tmp_path / "v.toml"
    )
    assert code == 2 and "--hessians: expected a BF16 GGUF" in err


def test_texts_of_one_name_cannot_both_be_domains(run: Run, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    texts = ["--text", tmp_path / "a" / "t.txt", "--text", tmp_path / "b" / "t.txt"]
    code, _, err = run("evaluate", base, base, *texts)
    assert (code, "texts with different names" in err) == (2, True)
