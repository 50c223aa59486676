"""`quant quantize`: one call for many variants, what is asked is checked before, and a second call goes on."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quant.cli.options import quant
from quant.errors import QuantError
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
    """A model, its imatrix, and two variants."""
    write_matrix(tmp_path / "m.gguf", write_base(tmp_path / "M-BF16.gguf", LARGE))
    for name, kind in (("A", "Q4_K"), ("B", "Q6_K")):
        (tmp_path / f"{name}.toml").write_text(VARIANT.format(name=name, type=kind))
    return tmp_path


def called(folder: Path, *args: str, matrix: bool = True) -> Result:
    given = ["--imatrix", str(folder / "m.gguf")] if matrix else []
    return CliRunner().invoke(
        quant, ["quantize", str(folder / "M-BF16.gguf"), "-o", str(folder / "out"), *given, *args]
    )


def variants(folder: Path, *names: str) -> list[str]:
    return [part for name in names for part in ("-v", str(folder / f"{name}.toml"))]


@pytest.mark.tools
def test_every_variant_is_written_with_a_record_of_its_tensors_and_nothing_else_is_left(
    folder: Path,
) -> None:
    done = called(folder, *variants(folder, "A", "B"), "--jobs", "1", "--memory", "1G")
    assert done.exit_code == 0, done.output
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
def test_what_stands_is_not_made_again_and_what_is_another_is_not_written_over(
    folder: Path,
) -> None:
    assert called(folder, *variants(folder, "A")).exit_code == 0
    before = (folder / "out" / "M-A.gguf").stat()
    assert called(folder, *variants(folder, "A", "B")).exit_code == 0
    assert (folder / "out" / "M-A.gguf").stat() == before
    (folder / "A.toml").write_text(VARIANT.format(name="A", type="Q5_K"))
    refused = called(folder, *variants(folder, "A", "B"))
    assert isinstance(refused.exception, QuantError)
    assert "M-A.gguf: exists already" in str(refused.exception)
    assert (folder / "out" / "M-A.gguf").stat() == before


@pytest.mark.tools
def test_shards_are_written_where_a_size_is_given(folder: Path) -> None:
    done = called(folder, *variants(folder, "B"), "--max-size", "1M")
    assert done.exit_code == 0, done.output
    [first, *_] = sorted((folder / "out").glob("*.gguf"))
    assert len(read_headers(first)) > 1


@pytest.mark.tools
def test_without_an_imatrix_only_types_that_need_none_are_made(folder: Path) -> None:
    assert called(folder, *variants(folder, "A"), matrix=False).exit_code == 0
    (folder / "B.toml").write_text(VARIANT.format(name="B", type="IQ2_XXS"))
    refused = called(folder, *variants(folder, "B"), matrix=False)
    assert "IQ2_XXS needs imatrix data" in str(refused.exception)


@pytest.mark.parametrize(
    ("args", "said"), [(("--max-size", "1T"), "'1T'"), (("--memory", "much"), "'much'")]
)
def test_a_size_that_is_none_is_a_wrong_call(
    folder: Path, args: tuple[str, str], said: str
) -> None:
    done = called(folder, *variants(folder, "A"), *args)
    assert done.exit_code == 2 and said in done.output


def test_the_base_itself_is_no_variant_to_make(folder: Path) -> None:
    refused = called(folder, "-v", "BF16")
    assert isinstance(refused.exception, QuantError)
    assert "variant BF16: expected rules to quantise by, found none" in str(refused.exception)
