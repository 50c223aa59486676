"""`quant quantize`: one call for many variants, checked before the work, continued by a rerun."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quant.cli.options import quant
from quant.core.errors import QuantError
from quant.llama.gguf import read_header, read_headers
from tests.quant.quantize.engine.models import LARGE, write_base, write_matrix

VARIANT = """
name = "{name}"
summary = "For tests."
file_type = "Q4_K_M"

[[rules]]
tensors = '.*'
type = "{type}"
why = "For tests."
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a model, its imatrix, and two variants."""
    write_matrix(tmp_path / "m.gguf", write_base(tmp_path / "M-BF16.gguf", LARGE))
    for name, kind in (("A", "Q4_K"), ("B", "Q6_K")):
        (tmp_path / f"{name}.toml").write_text(VARIANT.format(name=name, type=kind))
    return tmp_path


def run_quantize(folder: Path, *args: str, imatrix: bool = True) -> Result:
    options = ["--imatrix", str(folder / "m.gguf")] if imatrix else []
    return CliRunner().invoke(
        quant, ["quantize", str(folder / "M-BF16.gguf"), "-o", str(folder / "out"), *options, *args]
    )


def variants(folder: Path, *names: str) -> list[str]:
    return [part for name in names for part in ("-v", str(folder / f"{name}.toml"))]


@pytest.mark.tools
def test_every_variant_is_written_with_a_record_of_its_tensors_and_nothing_else_is_left(
    folder: Path,
) -> None:
    result = run_quantize(folder, *variants(folder, "A", "B"), "--jobs", "1", "--memory", "1G")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "M-A.gguf",
        "M-A.gguf.json",
        "M-B.gguf",
        "M-B.gguf.json",
    ]
    header = read_header(folder / "out" / "M-B.gguf")
    record = json.loads((folder / "out" / "M-B.gguf.json").read_text())
    assert {n: t["sha256"] for n, t in record["tensors"].items()} == header.hash_tensors()
    assert 0 < record["tensors"]["output.weight"]["error"] < 0.01


@pytest.mark.tools
def test_finished_files_are_not_written_again_and_other_files_not_overwritten(
    folder: Path,
) -> None:
    assert run_quantize(folder, *variants(folder, "A")).exit_code == 0
    before = (folder / "out" / "M-A.gguf").stat()
    assert run_quantize(folder, *variants(folder, "A", "B")).exit_code == 0
    assert (folder / "out" / "M-A.gguf").stat() == before
    (folder / "A.toml").write_text(VARIANT.format(name="A", type="Q5_K"))
    refused = run_quantize(folder, *variants(folder, "A", "B"))
    assert isinstance(refused.exception, QuantError)
    assert "M-A.gguf: exists already" in str(refused.exception)
    assert (folder / "out" / "M-A.gguf").stat() == before


@pytest.mark.tools
def test_shards_are_written_if_a_size_is_given(folder: Path) -> None:
    result = run_quantize(folder, *variants(folder, "B"), "--max-size", "1M")
    assert result.exit_code == 0, result.output
    [first, *_] = sorted((folder / "out").glob("*.gguf"))
    assert len(read_headers(first)) > 1


@pytest.mark.tools
def test_without_an_imatrix_types_that_need_one_are_refused(folder: Path) -> None:
    assert run_quantize(folder, *variants(folder, "A"), imatrix=False).exit_code == 0
    (folder / "B.toml").write_text(VARIANT.format(name="B", type="IQ2_XXS"))
    refused = run_quantize(folder, *variants(folder, "B"), imatrix=False)
    assert "IQ2_XXS needs imatrix data" in str(refused.exception)


@pytest.mark.parametrize(
    ("args", "message"), [(("--max-size", "1T"), "'1T'"), (("--memory", "much"), "'much'")]
)
def test_a_wrong_size_is_a_usage_error(folder: Path, args: tuple[str, str], message: str) -> None:
    result = run_quantize(folder, *variants(folder, "A"), *args)
    assert result.exit_code == 2 and message in result.output


def test_the_variant_without_rules_is_refused(folder: Path) -> None:
    refused = run_quantize(folder, "-v", "BF16")
    assert isinstance(refused.exception, QuantError)
    assert "variant BF16: expected rules to quantize by, found none" in str(refused.exception)
