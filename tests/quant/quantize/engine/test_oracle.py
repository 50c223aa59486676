"""Whole files equal llama-quantize's: every type, with and without an imatrix or experts."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES
from quant.plan.recipe import parse_size
from quant.quantize.engine import chunks
from quant.quantize.engine.run import run_engine
from quant.quantize.engine.work import quantize_job
from tests.llama_quantize import llama_quantize, type_file
from tests.quant.quantize.engine.models import (
    LARGE,
    MATRIX_NAME,
    job,
    types,
    write_base,
    write_matrix,
)

pytestmark = pytest.mark.tools

ALL_TYPES = [t.name for t in TYPES.values() if t.name not in ("F64", "I8", "I16", "I32", "I64")]


def test_names_are_escaped_and_anchored() -> None:
    lines = type_file({"blk.1.ffn_down.weight": "Q4_K", "a+b[0].weight": "IQ2_XXS"}).splitlines()
    assert lines == [r"^blk\.1\.ffn_down\.weight$=q4_k", r"^a\+b\[0\]\.weight$=iq2_xxs"]


def test_every_line_matches_one_tensor() -> None:
    names = [
        f"blk.{n}.ffn_{part}.weight" for n in (1, 11, 111) for part in ("up", "up_exps", "gate_up")
    ]
    for line, name in zip(type_file(dict.fromkeys(names, "Q4_K")).splitlines(), names, strict=True):
        assert [other for other in names if re.search(line.rpartition("=")[0], other)] == [name]


def test_no_types_are_an_empty_file() -> None:
    assert type_file({}) == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model and its imatrix."""
    folder = tmp_path_factory.mktemp("oracle")
    write_matrix(folder / MATRIX_NAME, write_base(folder / "base.gguf"))
    return folder


@pytest.fixture(scope="module")
def with_matrix(folder: Path) -> dict[str, Path]:
    """Write every type in one pass, in a process of its own."""
    paths = {name: folder / f"{name}.gguf" for name in ALL_TYPES}
    base = folder / "base.gguf"
    run_engine(
        job(base, folder / MATRIX_NAME, {p: types(base, n) for n, p in paths.items()}),
        folder / "work",
    )
    return paths


@pytest.mark.parametrize("name", ALL_TYPES)
def test_with_an_imatrix(name: str, folder: Path, with_matrix: dict[str, Path]) -> None:
    base, matrix = folder / "base.gguf", folder / MATRIX_NAME
    expected = llama_quantize(base, matrix, types(base, name), "Q8_0", folder / f"{name}.oracle")
    assert with_matrix[name].read_bytes() == expected.read_bytes()


@pytest.fixture(scope="module")
def without_matrix(folder: Path) -> dict[str, Path]:
    """Write every type that needs no imatrix, in small chunks, in this process."""
    paths = {
        name: folder / f"{name}-static.gguf" for name in ALL_TYPES if not TYPES[name].needs_imatrix
    }
    base = folder / "base.gguf"
    before = chunks.CHUNK_WEIGHTS
    chunks.CHUNK_WEIGHTS = 512 * 7
    try:
        quantize_job(
            job(base, None, {p: types(base, n) for n, p in paths.items()}, "Q4_K_M", jobs=3),
            folder,
        )
    finally:
        chunks.CHUNK_WEIGHTS = before
    return paths


@pytest.mark.parametrize("name", [n for n in ALL_TYPES if not TYPES[n].needs_imatrix])
def test_without_an_imatrix_in_chunks_that_do_not_divide_the_rows(
    name: str, folder: Path, without_matrix: dict[str, Path]
) -> None:
    base = folder / "base.gguf"
    expected = llama_quantize(
        base, None, types(base, name), "Q4_K_M", folder / f"{name}-static.oracle"
    )
    assert without_matrix[name].read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("size", ["1M", "2M", "3M"])
def test_shards_are_those_of_llama_gguf_split(size: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", LARGE)
    matrix = write_matrix(tmp_path / MATRIX_NAME, base)
    whole, cut = tmp_path / "whole" / "M-V.gguf", tmp_path / "cut" / "M-V.gguf"
    request = job(base, matrix, {whole: types(base, "Q8_0"), cut: types(base, "Q8_0")})
    quantize_job(
        replace(
            request,
            variants=(
                request.variants[0],
                replace(request.variants[1], max_bytes=parse_size(size)),
            ),
        ),
        tmp_path,
    )
    expected = tmp_path / "expected"
    expected.mkdir()
    command: list[str | Path] = ["--split", "--split-max-size", size, whole, expected / "M-V"]
    subprocess.run(
        [find_toolchain().path("llama-gguf-split"), *command], check=True, capture_output=True
    )
    written = {p.name: p.read_bytes() for p in cut.parent.glob("*.gguf")}
    assert written == {p.name: p.read_bytes() for p in expected.iterdir()}
    assert len(written) > 1
