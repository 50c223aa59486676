"""`quant probe` on tiny-glm: machines share probes; `quant allocate --measured` uses them."""

import json
from pathlib import Path

import pytest

from quant.core import files
from quant.evaluate import error_measurement
from quant.llama.toolchain import find_toolchain
from quant.plan import error_table, sensitivity
from tests.quant.cli.conftest import Run

pytestmark = pytest.mark.tools
TEXT = "Hello! My name is Eve. What is the capital of France? The capital of France is Paris.\n"


@pytest.fixture(scope="module")
def inputs(
    tiny: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """The tiny model, an error database of two types, and a text."""
    base, folder = tiny[0], tmp_path_factory.mktemp("probing")
    error_table.write_error_table(
        folder / "errors.json",
        error_measurement.measure_errors(
            base, None, find_toolchain(), types=("Q3_K", "Q4_K", "Q6_K", "Q8_0")
        ),
    )
    files.write_text(folder / "text.txt", "".join(f"{n}. {TEXT}" for n in range(400)))
    return base, folder / "errors.json", folder / "text.txt"


def test_merged_parts_give_the_sensitivities_of_one_machine(
    run: Run,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
) -> None:
    base, errors, text = inputs
    common = (
        "probe",
        base,
        "--errors",
        errors,
        "--text",
        text,
        "--work",
        tmp_path / "work",
        "--cheap",
        "--chunks",
        "8",
    )
    assert run(*common, "-o", tmp_path / "all.json")[0] == 0
    assert run(*common, "--part", "1/2", "-o", tmp_path / "one.json")[0] == 0
    code, _, err = run(*common, "--merge", tmp_path / "one.json", "-o", tmp_path / "merged.json")
    assert code == 0
    alone, merged = (
        sensitivity.read_sensitivities(tmp_path / f"{n}.json") for n in ("all", "merged")
    )
    assert len(merged.probes) == len(alone.probes)
    assert merged.scales == pytest.approx(alone.scales)
    count = len(alone.probes)
    assert f"0 of {count // 2} probes are to be measured" in err

    code, _, err = run(
        *common[:-1], "9", "--merge", tmp_path / "one.json", "-o", tmp_path / "x.json"
    )
    assert (code, "measured in another way: expected probes on text.txt" in err) == (2, True)
    size = (
        "allocate",
        base,
        "--errors",
        errors,
        "--text",
        text,
        "--chunks",
        "8",
        "--size",
        "7MB",
        "--json",
    )
    kept = ("--sensitivity", tmp_path / "all.json", "-o", tmp_path / "v.toml")
    code, text_out, err = run(*size, *kept, "--measured", "4")
    assert code == 0, err
    [variant] = json.loads(text_out)["variants"]
    assert 0.998 * 7e6 <= variant["bytes"] <= 7e6
    assert 0 < variant["kld_measured"] < 0.1
    assert "the best of the files that were built" in (tmp_path / "v.toml").read_text()
    code, _, err = run(*size, "--sensitivity", tmp_path / "one.json", "-o", tmp_path / "v.toml")
    assert (code, "a part of the probes, to be merged" in err) == (2, True)


def test_a_forecast_measures_nothing(
    run: Run,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
) -> None:
    base, errors, text = inputs
    code, _, err = run(
        "probe", base, "--errors", errors, "--text", text, "--forecast", "-o", tmp_path / "s.json"
    )
    assert (code, "probes are to be measured" in err) == (0, True)
    assert not (tmp_path / "s.json").exists()
