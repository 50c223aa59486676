"""The error database: what ggml's types do to rows, weighted, sampled, and bound to its model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quant.core import files
from quant.errors import InputError
from quant.evaluate.error_measurement import measure_errors
from quant.llama import ggml
from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES
from quant.plan import error_table
from quant.plan.error_table import ErrorTable
from quant.quantize.engine.chunks import Chunk
from quant.quantize.engine.weights import ColumnImportance, WeightSource
from tests.quant.quantize.engine.models import write_base, write_matrix

pytestmark = pytest.mark.tools
KINDS = ("IQ2_XXS", "Q2_K", "Q4_K", "Q8_0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("distortion")
    base = write_base(folder / "base.gguf")
    return base, write_matrix(folder / "imatrix.gguf", base)


@pytest.fixture(scope="module")
def found(model: tuple[Path, Path]) -> ErrorTable:
    return measure_errors(*model, find_toolchain(), types=KINDS)


def test_an_error_is_the_weighted_share_that_was_lost(
    model: tuple[Path, Path], found: ErrorTable
) -> None:
    source, matrix, library = (
        WeightSource.open(model[0]),
        ColumnImportance.open(model[1]),
        ggml.load_ggml(ggml.find_library(find_toolchain().bin)),
    )
    tensor = source.header.by_name["blk.0.attn_q.weight"]
    rows = library.to_float(
        tensor.type, source.raw(tensor, Chunk(0, 0, 0, tensor.shape[1])), tensor.shape[0]
    )
    columns = matrix.columns(tensor, 0)
    assert columns is not None
    library.initialise(TYPES["Q4_K"])
    back = library.to_float(
        TYPES["Q4_K"], library.kernel(TYPES["Q4_K"])(rows, columns), tensor.shape[0]
    )
    lost = ((back - rows).astype(np.float64) ** 2 * columns).sum() / (
        rows.astype(np.float64) ** 2 * columns
    ).sum()
    assert found.errors[tensor.name]["Q4_K"].share == pytest.approx(lost, rel=1e-4)
    assert found.errors[tensor.name]["Q4_K"].deviation == 0


def test_experts_count_as_often_as_they_are_visited(
    model: tuple[Path, Path], found: ErrorTable
) -> None:
    source, matrix, library = (
        WeightSource.open(model[0]),
        ColumnImportance.open(model[1]),
        ggml.load_ggml(ggml.find_library(find_toolchain().bin)),
    )
    tensor, kind = source.header.by_name["blk.0.ffn_down_exps.weight"], TYPES["Q2_K"]
    library.initialise(kind)
    visits = np.fromfile(
        model[1],
        "<f4",
        5,
        offset=matrix.header.data_start + matrix.header.by_name[f"{tensor.name}.counts"].offset,
    )
    assert len(set(visits)) > 1
    lost = whole = 0.0
    for expert, count in enumerate(np.maximum(visits, 1)):
        first, columns = expert * tensor.shape[1], matrix.columns(tensor, expert)
        rows = library.to_float(
            tensor.type,
            source.raw(tensor, Chunk(0, expert, first, tensor.shape[1])),
            tensor.shape[0],
        )
        back = library.to_float(kind, library.kernel(kind)(rows, columns), tensor.shape[0])
        assert columns is not None
        lost += float(((back - rows).astype(np.float64) ** 2 * columns).sum() * count)
        whole += float((rows.astype(np.float64) ** 2 * columns).sum() * count)
    assert found.errors[tensor.name]["Q2_K"].share == pytest.approx(lost / whole, rel=1e-4)


def test_finer_types_lose_less(found: ErrorTable) -> None:
    for name, by_type in found.errors.items():
        shares = [by_type[k].share for k in ("Q2_K", "Q4_K", "Q8_0")]
        assert shares == sorted(shares, reverse=True), name


def test_types_that_need_importance_are_only_measured_where_it_is(found: ErrorTable) -> None:
    assert "IQ2_XXS" in found.errors["blk.0.attn_q.weight"]
    assert "IQ2_XXS" not in found.errors["blk.10.ffn_down.weight"]
    assert "IQ2_XXS" not in found.errors["token_embd.weight"]


def test_a_sample_of_rows_is_near_the_whole_and_says_how_near(
    model: tuple[Path, Path], found: ErrorTable
) -> None:
    sampled = measure_errors(*model, find_toolchain(), types=KINDS, rows=40)
    for name in ("blk.0.attn_output.weight", "token_embd.weight", "blk.0.ffn_down_exps.weight"):
        few, all_ = sampled.errors[name]["Q2_K"], found.errors[name]["Q2_K"]
        assert few.deviation > 0
        assert abs(few.share - all_.share) < 5 * few.deviation
        assert sampled.squares[name] == pytest.approx(found.squares[name], rel=0.3)


def test_it_is_read_as_it_was_written_and_only_for_its_model(
    found: ErrorTable, tmp_path: Path
) -> None:
    path = tmp_path / "errors.json"
    error_table.write_error_table(path, found)
    assert error_table.read_error_table(path, found.base) == found
    with pytest.raises(
        InputError, match=r"of another model: its base is \w{12}…, this one is 000000000000…"
    ):
        error_table.read_error_table(path, "0" * 64)


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON", '{"form": "something"}'])
def test_another_file_is_no_database(text: str, tmp_path: Path) -> None:
    files.write_text(tmp_path / "x.json", text)
    with pytest.raises(InputError, match=r"x\.json: expected an error database"):
        error_table.read_error_table(tmp_path / "x.json")


def test_types_can_be_left_out_afterwards(found: ErrorTable) -> None:
    assert set(found.only(["Q4_K"]).errors["output.weight"]) == {"Q4_K"}
    assert replace(found.only(KINDS)) == found
