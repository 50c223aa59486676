"""Whole files, byte for byte those of llama-quantize: every type, with and without an imatrix, dense and with experts."""

import subprocess
from pathlib import Path

import pytest

from quant import files
from quant.engine import chunks
from quant.engine.run import run
from quant.engine.work import work
from quant.ggml_types import TYPES
from quant.header import read_header
from quant.plan import quantizable
from quant.quantize import type_file
from quant.toolchain import find
from tests.quant.engine.models import MATRIX_NAME, job, types, write_base, write_matrix

pytestmark = pytest.mark.tools

TRIED = [t.name for t in TYPES.values() if t.name not in ("F64", "I8", "I16", "I32", "I64")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its imatrix."""
    made = tmp_path_factory.mktemp("oracle")
    write_matrix(made / MATRIX_NAME, write_base(made / "base.gguf"))
    return made


def oracle(folder: Path, chosen: dict[str, str], out: Path, *, matrix: bool, file_type: str = "Q8_0") -> bytes:
    """What llama-quantize makes of the same table."""
    tensors = read_header(folder / "base.gguf").by_name
    table = folder / f"{out.name}.txt"
    files.write_text(table, type_file({n: t for n, t in chosen.items() if quantizable(tensors[n])}))
    given = ["--imatrix", MATRIX_NAME] if matrix else []
    command = [*given, "--tensor-type-file", table.name, "base.gguf", out.name, file_type, "2"]
    done = subprocess.run(
        [find().path("llama-quantize"), *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / out.name).read_bytes()


@pytest.fixture(scope="module")
def with_matrix(folder: Path) -> dict[str, Path]:
    """Every type in one pass, in a process of its own."""
    wanted = {name: folder / f"{name}.gguf" for name in TRIED}
    base = folder / "base.gguf"
    run(job(base, folder / MATRIX_NAME, {p: types(base, n) for n, p in wanted.items()}), folder / "work")
    return wanted


@pytest.mark.parametrize("name", TRIED)
def test_with_an_imatrix(name: str, folder: Path, with_matrix: dict[str, Path]) -> None:
    expected = oracle(folder, types(folder / "base.gguf", name), folder / f"{name}.oracle", matrix=True)
    assert with_matrix[name].read_bytes() == expected


@pytest.fixture(scope="module")
def without_matrix(folder: Path) -> dict[str, Path]:
    """Every type that needs none, in one pass over chunks of few rows, within this process."""
    wanted = {name: folder / f"{name}-static.gguf" for name in TRIED if not TYPES[name].needs_imatrix}
    base = folder / "base.gguf"
    before = chunks.CHUNK_WEIGHTS
    chunks.CHUNK_WEIGHTS = 512 * 7
    try:
        work(job(base, None, {p: types(base, n) for n, p in wanted.items()}, "Q4_K_M", jobs=3), folder)
    finally:
        chunks.CHUNK_WEIGHTS = before
    return wanted


@pytest.mark.parametrize("name", [n for n in TRIED if not TYPES[n].needs_imatrix])
def test_without_an_imatrix_in_chunks_that_do_not_divide_the_rows(
    name: str, folder: Path, without_matrix: dict[str, Path]
) -> None:
    chosen = types(folder / "base.gguf", name)
    expected = oracle(folder, chosen, folder / f"{name}-static.oracle", matrix=False, file_type="Q4_K_M")
    assert without_matrix[name].read_bytes() == expected
