"""The error table: the error of ggml's types, weighted, sampled, and of one model."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from quant.core import files
from quant.core.errors import InputError
from quant.evaluate.error_measurement import measure_errors
from quant.llama import ggml
from quant.llama.ggml import Library
from quant.llama.gguf import TensorSpec
from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES
from quant.plan import error_table
from quant.plan.error_table import ErrorTable
from quant.quantize.engine.chunks import Chunk
from quant.quantize.engine.weights import ColumnImportance, WeightSource
from tests.quant.quantize.engine.models import write_base, write_matrix

pytestmark = pytest.mark.tools
TYPES_MEASURED = ("IQ2_XXS", "Q2_K", "Q4_K", "Q8_0")


@dataclass(frozen=True)
class Oracle:
    """A base and its imatrix, read and quantized by ggml itself, expert by expert."""

    base: Path
    imatrix: Path
    source: WeightSource
    importance: ColumnImportance
    library: Library

    def energies(self, tensor: TensorSpec, kind: str, expert: int = 0) -> tuple[float, float]:
        """The weighted squares of an expert's errors, and of its weights."""
        rows = tensor.shape[1]
        chunk = Chunk(0, expert, expert * rows, rows)
        data = self.library.to_float(
            tensor.type, self.source.read_rows(tensor, chunk), tensor.shape[0]
        )
        columns = self.importance.columns(tensor, expert)
        assert columns is not None
        self.library.initialize(TYPES[kind])
        stored = self.library.kernel(TYPES[kind])(data, columns)
        restored = self.library.to_float(TYPES[kind], stored, tensor.shape[0])
        lost = ((restored - data).astype(np.float64) ** 2 * columns).sum()
        return float(lost), float((data.astype(np.float64) ** 2 * columns).sum())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("errors")
    base = write_base(folder / "base.gguf")
    imatrix = write_matrix(folder / "imatrix.gguf", base)
    library = ggml.load_ggml(ggml.find_library(find_toolchain().bin))
    return Oracle(base, imatrix, WeightSource.open(base), ColumnImportance.open(imatrix), library)


@pytest.fixture(scope="module")
def table(oracle: Oracle) -> ErrorTable:
    return measure_errors(oracle.base, oracle.imatrix, find_toolchain(), types=TYPES_MEASURED)


def test_an_error_is_the_relative_weighted_mse(oracle: Oracle, table: ErrorTable) -> None:
    tensor = oracle.source.header.by_name["blk.0.attn_q.weight"]
    lost, energy = oracle.energies(tensor, "Q4_K")
    error = table.errors[tensor.name]["Q4_K"]
    assert error.relative_mse == pytest.approx(lost / energy, rel=1e-4)
    assert error.standard_error == 0


def test_experts_count_as_often_as_they_are_visited(oracle: Oracle, table: ErrorTable) -> None:
    tensor = oracle.source.header.by_name["blk.0.ffn_down_exps.weight"]
    header = oracle.importance.header
    start = header.data_start + header.by_name[f"{tensor.name}.counts"].offset
    visits = np.fromfile(oracle.imatrix, "<f4", 5, offset=start)
    assert len(set(visits)) > 1
    lost = energy = 0.0
    for expert, count in enumerate(np.maximum(visits, 1)):
        of_lost, of_energy = oracle.energies(tensor, "Q2_K", expert)
        lost, energy = lost + of_lost * float(count), energy + of_energy * float(count)
    assert table.errors[tensor.name]["Q2_K"].relative_mse == pytest.approx(lost / energy, rel=1e-4)


def test_finer_types_have_smaller_errors(table: ErrorTable) -> None:
    for name, by_type in table.errors.items():
        errors = [by_type[k].relative_mse for k in ("Q2_K", "Q4_K", "Q8_0")]
        assert errors == sorted(errors, reverse=True), name


def test_types_that_need_an_imatrix_are_measured_only_where_it_has_data(table: ErrorTable) -> None:
    assert "IQ2_XXS" in table.errors["blk.0.attn_q.weight"]
    assert "IQ2_XXS" not in table.errors["blk.10.ffn_down.weight"]
    assert "IQ2_XXS" not in table.errors["token_embd.weight"]


def test_a_sample_of_rows_is_as_close_as_its_standard_error_says(
    oracle: Oracle, table: ErrorTable
) -> None:
    sample = measure_errors(
        oracle.base, oracle.imatrix, find_toolchain(), types=TYPES_MEASURED, rows=40
    )
    for name in ("blk.0.attn_output.weight", "token_embd.weight", "blk.0.ffn_down_exps.weight"):
        few, all_ = sample.errors[name]["Q2_K"], table.errors[name]["Q2_K"]
        assert few.standard_error > 0
        assert abs(few.relative_mse - all_.relative_mse) < 5 * few.standard_error
        assert sample.squares[name] == pytest.approx(table.squares[name], rel=0.3)


def test_a_table_is_read_as_it_was_written_and_only_for_its_model(
    table: ErrorTable, tmp_path: Path
) -> None:
    path = tmp_path / "errors.json"
    error_table.write_error_table(path, table)
    assert error_table.read_error_table(path, table.base) == table
    with pytest.raises(
        InputError, match=r"of another model: its base is \w{12}…, this one is 000000000000…"
    ):
        error_table.read_error_table(path, "0" * 64)


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON", '{"form": "something"}'])
def test_another_file_is_no_database(text: str, tmp_path: Path) -> None:
    files.write_text(tmp_path / "x.json", text)
    with pytest.raises(InputError, match=r"x\.json: expected an error database"):
        error_table.read_error_table(tmp_path / "x.json")


def test_types_can_be_left_out_afterwards(table: ErrorTable) -> None:
    assert set(table.select_types(["Q4_K"]).errors["output.weight"]) == {"Q4_K"}
    assert replace(table.select_types(TYPES_MEASURED)) == table
