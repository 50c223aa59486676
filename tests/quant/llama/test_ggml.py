"""The binding to ggml: where the library is found, what it must have, and that its rows are gguf-py's."""

import dataclasses
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.core.errors import ToolError
from quant.llama import ggml, types
from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES

ROWS = np.random.default_rng(3).normal(0, 0.02, (5, 512)).astype(np.float32)
EXACT = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
"""Types that gguf-py quantizes to the same bytes as the kernels do without an imatrix."""
READ = (
    "F16",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_S",
    "IQ3_XXS",
    "IQ2_XXS",
    *EXACT,
)


@pytest.fixture(scope="module")
def library() -> ggml.Library:
    return ggml.load_ggml(ggml.find_library(find_toolchain().bin))


@pytest.mark.tools
@pytest.mark.parametrize("name", EXACT)
def test_quantized_rows_are_gguf_pys(library: ggml.Library, name: str) -> None:
    library.initialize(TYPES[name])
    expected = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType[name])
    assert library.kernel(TYPES[name])(ROWS, None).tobytes() == expected.tobytes()


@pytest.mark.tools
@pytest.mark.parametrize("name", READ)
def test_rows_are_read_back_as_gguf_py_reads_them(library: ggml.Library, name: str) -> None:
    data = library.kernel(TYPES[name])(ROWS, np.ones(512, np.float32))
    expected = gguf.quants.dequantize(data.reshape(5, -1), gguf.GGMLQuantizationType[name])
    actual = library.to_float(TYPES[name], data, 512)
    assert actual.shape == ROWS.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)
    assert library.is_valid(TYPES[name], data)


@pytest.mark.tools
def test_weights_of_columns_change_the_bytes(library: ggml.Library) -> None:
    kernel = library.kernel(TYPES["Q4_K"])
    some = np.linspace(0.01, 9, 512, dtype=np.float32)
    assert kernel(ROWS, some).tobytes() != kernel(ROWS, np.ones(512, np.float32)).tobytes()


@pytest.mark.tools
def test_a_row_with_a_nan_scale_is_not_valid(library: ggml.Library) -> None:
    data = library.kernel(TYPES["Q8_0"])(ROWS, None)
    data[34:36] = (0x00, 0x7E)
    assert not library.is_valid(TYPES["Q8_0"], data)


@pytest.mark.tools
def test_the_librarys_types_are_those_of_the_table(
    library: ggml.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(library.find_type_differences())
    wrong = {**TYPES, "Q4_K": dataclasses.replace(TYPES["Q4_K"], block_bytes=143)}
    monkeypatch.setattr(ggml, "TYPES", wrong)
    assert list(library.find_type_differences()) == [
        f"{library.path}: type 12: expected ('Q4_K', 256, 143), found ('Q4_K', 256, 144)"
    ]
    assert types.TYPES is TYPES


@pytest.mark.tools
def test_the_library_is_found_in_a_build_tree_through_a_link(tmp_path: Path) -> None:
    real = ggml.find_library(find_toolchain().bin)
    tree = tmp_path / "build" / "bin"
    tree.mkdir(parents=True)
    (tree / ggml.NAME).symlink_to(real)
    assert ggml.find_library(tree) == tree / ggml.NAME


def test_a_file_that_is_no_library_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / ggml.NAME
    path.write_bytes(b"text")
    with pytest.raises(ToolError, match=rf"{path}: cannot be loaded"):
        ggml.load_ggml(path)


def test_all_missing_functions_are_named(tmp_path: Path) -> None:
    source, path = tmp_path / "empty.c", tmp_path / ggml.NAME
    source.write_text("int ggml_validate_row_data(void) { return 1; }\n")
    try:
        subprocess.run(["cc", "-shared", "-o", path, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    with pytest.raises(ToolError) as refused:
        ggml.load_ggml(path)
    assert set(refused.value.problems) == {
        f"{path}: {name}: no such function in this library"
        for name in ggml.SIGNATURES
        if name != "ggml_validate_row_data"
    }


def test_tools_without_the_library_are_an_error_that_lists_the_places(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    with pytest.raises(
        ToolError,
        match=rf"libggml-base.so: missing; looked for it in {tmp_path}/lib, {tmp_path}/bin",
    ):
        ggml.find_library(tmp_path / "bin")
