"""The layout of ggml's tensors: it is the library's, another one is refused, and views show the numbers."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.core.errors import ToolError
from quant.llama import ggml, ggml_graph
from quant.llama.ggml_graph import GraphTensor, load_graph_library, view_tensor
from quant.llama.model import find_bindings


@pytest.mark.tools
def test_the_layout_is_that_of_the_bindings_library() -> None:
    library = load_graph_library(find_bindings() / ggml.NAME)
    assert library.matmul != library.expert_matmul


@pytest.mark.tools
@pytest.mark.parametrize("field", ["buffer", "op_params", "view_src", "view_offs"])
def test_a_layout_with_a_field_too_few_is_refused(
    monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = tuple(f for f in GraphTensor._fields_ if f[0] != field)

    monkeypatch.setattr(ggml_graph, "GraphTensor", Shifted)
    expected = (
        r"libggml-base\.so: ggml_tensor: .*: expected .*, found .*: of another version than the"
        r" lock file's; run `uv sync` in the project's folder"
    )
    with pytest.raises(ToolError, match=expected):
        load_graph_library(find_bindings() / ggml.NAME)


def test_a_library_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ToolError, match=r"/nowhere/libggml-base\.so: cannot be loaded"):
        load_graph_library(Path("/nowhere") / ggml.NAME)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_view_shows_the_numbers_where_they_lie(transposed: bool) -> None:
    numbers = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    shown = numbers.swapaxes(2, 3) if transposed else numbers
    shape: Any = shown.shape[::-1]
    strides: Any = shown.strides[::-1]
    tensor = GraphTensor(ne=shape, nb=strides, data=numbers.ctypes.data)
    view = view_tensor(tensor, np.float32)
    assert np.array_equal(view, shown)
    numbers[0, 1, 2, 3] = -1
    assert (view == -1).any()
