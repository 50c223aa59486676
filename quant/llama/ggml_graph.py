"""Look into a computation of ggml: the tensors of its graph, where they lie in memory.

llama.cpp calls back for every tensor that it computes (see :class:`quant.llama.model.LoadedModel`),
and passes its address. A tensor is read there by the layout of ``struct ggml_tensor``, which is no
stable interface: so the layout is compared with the loaded library before anything is read by it.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from quant.core.errors import ToolError
from quant.llama.ggml import BOOL, INT, INT64, POINTER, SIZE, STRING, Signatures, load_functions
from quant.llama.types import TYPES

F32, I32 = TYPES["F32"].id, TYPES["I32"].id


class GraphTensor(ctypes.Structure):
    """``struct ggml_tensor`` (ggml/include/ggml.h), as far as it is read here."""

    _fields_ = (
        ("type", INT),
        ("buffer", POINTER),
        ("ne", INT64 * 4),
        ("nb", SIZE * 4),
        ("op", INT),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", POINTER * 10),
        ("view_src", POINTER),
        ("view_offs", SIZE),
        ("data", POINTER),
        ("name", ctypes.c_char * 64),
    )


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", BOOL))


SIGNATURES: Signatures = {
    # function              result   arguments (ggml/include/ggml.h, ggml-backend.h)
    "ggml_init": (POINTER, (_InitParams,)),
    "ggml_free": (None, (POINTER,)),
    "ggml_new_tensor_3d": (POINTER, (POINTER, INT, INT64, INT64, INT64)),
    "ggml_set_name": (POINTER, (POINTER, STRING)),
    "ggml_get_data": (POINTER, (POINTER,)),
    "ggml_mul_mat": (POINTER, (POINTER, POINTER, POINTER)),
    "ggml_mul_mat_id": (POINTER, (POINTER, POINTER, POINTER, POINTER)),
    "ggml_op_name": (STRING, (INT,)),
    "ggml_type_name": (STRING, (INT,)),
    "ggml_backend_buffer_is_host": (BOOL, (POINTER,)),
}


@dataclass(frozen=True)
class GraphLibrary:
    """The ggml that computes the graph, and the numbers of its two matrix multiplications."""

    path: Path
    functions: Mapping[str, Any]
    matmul: int
    """``op`` of ggml_mul_mat."""
    expert_matmul: int
    """``op`` of ggml_mul_mat_id, which picks matrices of experts by number."""

    def is_host(self, tensor: GraphTensor) -> bool:
        """Whether a tensor lies in main memory."""
        return bool(self.functions["ggml_backend_buffer_is_host"](tensor.buffer))


def load_graph_library(path: Path) -> GraphLibrary:
    """Load a libggml-base and compare its layout of tensors with :class:`GraphTensor`.

    Args:
        path: The library that computes the graph, not another copy of it.

    Raises:
        ToolError: It cannot be loaded, lacks a function, or has another layout.
    """
    functions = load_functions(path, SIGNATURES)
    matmul, expert_matmul = _check_layout(path, functions)
    return GraphLibrary(path, functions, matmul, expert_matmul)


def view_tensor(tensor: GraphTensor, dtype: DTypeLike) -> NDArray[Any]:
    """Return a tensor's numbers where they lie, as an array of shape (ne3, ne2, ne1, ne0).

    The array is valid as long as the tensor's memory is.
    """
    shape, strides, item = [*tensor.ne][::-1], [*tensor.nb][::-1], np.dtype(dtype).itemsize
    # To the end of the last number: the strides of a view or a permuted tensor leave gaps, so the
    # product of the shape is too short.
    span = item + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return np.ndarray(shape, dtype, (ctypes.c_char * span).from_address(tensor.data), 0, strides)


def _check_layout(path: Path, call: Mapping[str, Any]) -> tuple[int, int]:
    """Create tensors whose every field is known, read them back, and return the two op numbers.

    Fields that are not compared lie between compared ones, so that a field which another version
    inserts or removes shows in the next.
    """
    # 64 KiB hold the six tensors and their data. With no_alloc a tensor would have no data, whose
    # address is compared.
    context = call["ggml_init"](_InitParams(2**16, None, False))
    # All sizes differ: a layout that takes one dimension for another shows.
    experts, inputs, ids = (
        call["ggml_new_tensor_3d"](context, ggml_type, *shape)
        for ggml_type, shape in ((F32, (6, 5, 4)), (F32, (6, 2, 3)), (I32, (2, 3, 1)))
    )
    matrix = call["ggml_new_tensor_3d"](context, F32, 6, 7, 1)
    call["ggml_set_name"](experts, b"blk.0.test.weight")
    tensor, product, expert_product = (
        GraphTensor.from_address(address)
        for address in (
            experts,
            call["ggml_mul_mat"](context, matrix, inputs),
            call["ggml_mul_mat_id"](context, experts, inputs, ids),
        )
    )
    fields: dict[str, tuple[Any, Any]] = {
        # field       expected, actual
        "name": (b"blk.0.test.weight", tensor.name),
        "type": (F32, tensor.type),
        "ne": ([6, 5, 4, 1], [*tensor.ne]),
        "nb": ([4, 24, 120, 480], [*tensor.nb]),
        "data": (call["ggml_get_data"](experts), tensor.data),
        "src": ([experts, inputs, ids], expert_product.src[:3]),
        "op of ggml_mul_mat": (b"MUL_MAT", call["ggml_op_name"](product.op)),
        "op of ggml_mul_mat_id": (b"MUL_MAT_ID", call["ggml_op_name"](expert_product.op)),
        "types": ([b"f32", b"i32"], [call["ggml_type_name"](t) for t in (F32, I32)]),
    }
    # Read before the context is freed: the structures lie in its memory.
    operations = product.op, expert_product.op
    call["ggml_free"](context)
    for field, (expected, actual) in fields.items():
        if actual != expected:
            raise ToolError(
                f"{path}: ggml_tensor: {field}: expected {expected}, found {actual}: of another"
                " version than the lock file's; run `uv sync` in the project's folder"
            )
    return operations
