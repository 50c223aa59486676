"""The importance of columns as llama-quantize computes it, and input files that must not change."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.calibration.imatrix_file import load_imatrix
from quant.core.errors import InputError
from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES
from quant.quantize.engine import weights
from quant.quantize.engine.chunks import split_into_chunks
from quant.quantize.engine.weights import ColumnImportance, InputFile, WeightSource
from tests.gguf_files import Tensor, write
from tests.quant.quantize.engine.models import _finish


def matrix(path: Path, **entries: tuple[np.ndarray, np.ndarray]) -> ColumnImportance:
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.weight.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.weight.counts", counts.astype(np.float32))
    return ColumnImportance.open(_finish(writer, path))


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", shape, TYPES["BF16"])


def test_each_expert_has_its_own_mean_and_one_without_tokens_weighs_1(tmp_path: Path) -> None:
    sums = np.array([[3, 6, 9, 1], [5, 5, 5, 5], [7, 1, 0, 2]])
    found = matrix(tmp_path / "m.gguf", a=(sums, np.array([[3], [0], [7]])))
    columns = [found.columns(spec("a", 4, 2, 3), expert) for expert in range(3)]
    means = np.array([[1, 2, 3, 1], [1, 1, 1, 1], [7, 1, 0, 2]], np.float32)
    expected = means / np.array([[1, 1, 1, 3], [1, 1, 1, 1], [7, 7, 7, 7]], np.float32)
    for got, want in zip(columns, expected, strict=True):
        assert got is not None and got.dtype == np.float32
        assert got.tolist() == want.tolist()


def test_one_count_can_stand_for_all_experts(tmp_path: Path) -> None:
    found = matrix(tmp_path / "m.gguf", a=(np.arange(8.0).reshape(2, 4), np.array([[2.0]])))
    second = found.columns(spec("a", 4, 3, 2), 1)
    assert second is not None and second.tolist() == [2.0, 2.5, 3.0, 3.5]


def test_a_tensor_without_an_entry_has_no_weights(tmp_path: Path) -> None:
    found = matrix(tmp_path / "m.gguf", a=(np.ones((1, 4)), np.ones((1, 1))))
    assert found.columns(spec("b", 4, 2), 0) is None


def test_data_of_another_size_is_told_except_for_the_embeddings(tmp_path: Path) -> None:
    found = matrix(
        tmp_path / "m.gguf",
        a=(np.ones((1, 8)), np.ones((1, 1))),
        token_embd=(np.ones((1, 8)), np.ones((1, 1))),
    )
    said = list(found.problems([spec("a", 4, 2), spec("token_embd", 4, 2)]))
    assert (
        len(said) == 1
        and "a.weight: of another model; expected 1 x 4 values, one for each column, found 8"
        in said[0]
    )
    assert found.columns(spec("token_embd", 4, 2), 0) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_told(tmp_path: Path, bad: float) -> None:
    found = matrix(tmp_path / "m.gguf", a=(np.array([[1, bad]]), np.ones((1, 1))))
    assert any(
        "a.weight: expected finite numbers, found" in p for p in found.problems([spec("a", 2, 2)])
    )


def test_a_file_that_is_no_imatrix_is_told(tmp_path: Path) -> None:
    found = ColumnImportance.open(write(tmp_path / "m.gguf"))
    assert any(
        "expected an importance matrix (tensors NAME.in_sum2" in p
        for p in found.problems([spec("a", 2, 2)])
    )


@pytest.mark.parametrize(
    ("sums", "counts", "problem"),
    [
        ([[1, 2], [3, -4]], [[1], [1]], "expected sums of squares, found -4.0 at value 3"),
        ([[1, 2], [3, 4]], [[1], [-1]], "expected counts of tokens, found one that is negative"),
        ([[1, 2], [3, 4]], [[1], [1], [1]], "as many values for each of 3 experts, found 4"),
    ],
)
def test_what_an_imatrix_cannot_hold_is_refused_as_where_one_is_loaded(
    sums: list[list[int]], counts: list[list[int]], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    columns = matrix(path, a=(np.array(sums), np.array(counts)))
    [message] = columns.problems([spec("a", 2, 2, 2)])
    assert problem in message
    with pytest.raises(InputError) as refused:
        load_imatrix(path)
    assert refused.value.problems == (message,)


def test_a_bad_value_behind_the_first_block_is_found_at_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", 16)
    sums = np.ones((1, 9))
    sums[0, 6] = np.nan
    columns = matrix(tmp_path / "m.gguf", a=(sums, np.ones((1, 1))))
    [message] = columns.problems([spec("a", 9, 2)])
    assert message.endswith("a.weight: expected finite numbers, found nan at value 6")


def test_reading_columns_loads_no_library_for_recipes_or_whole_files() -> None:
    code = "import sys, quant.quantize.engine.weights; print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pydantic", "gguf", "quant.plan.recipe", "quant.calibration.text"} & {*names}


def test_rows_are_read_from_their_place(tmp_path: Path) -> None:
    tensors = [Tensor("a.weight", (32, 3), "BF16"), Tensor("b.weight", (256, 9, 2), "BF16")]
    source = WeightSource.open(write(tmp_path / "base.gguf", tensors))
    found = b"".join(
        source.read_rows(source.header.by_name["b.weight"], c).tobytes()
        for c in split_into_chunks(spec("b", 256, 9, 2))
    )
    assert found == tensors[1].bytes()


def test_a_file_that_was_written_to_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345678")
    file = InputFile(path)
    file.check_unchanged()
    path.write_bytes(b"1234567")
    with pytest.raises(InputError, match="changed while it was read"):
        file.check_unchanged()
    with pytest.raises(
        InputError, match=r"thing: expected 4 bytes at byte 5, found 2; it was cut short"
    ):
        file.read(5, 4, "thing")
