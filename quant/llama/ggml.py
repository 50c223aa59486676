"""The binding to ggml's C library: quantize rows, read them back, and check them.

Only ``libggml-base.so`` is opened, which has the reference kernels that llama-quantize calls.
ctypes releases Python's lock while a function runs, so threads quantize side by side. Arguments and
results are numpy arrays. :mod:`quant.llama.ggml_graph` opens the same library to look into a
computation; both bind functions by :func:`load_functions`.

ggml aborts the whole process if a kernel meets numbers that it cannot place, such as a NaN in
IQ2_XS (docs/ggml-findings.md). Call it in a process that may die.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.core.errors import ToolError
from quant.llama import toolchain
from quant.llama.types import TYPES, GGMLType

NAME = "libggml-base.so"

Rows: TypeAlias = NDArray[np.float32]
"""Rows of weights, of shape (rows, columns)."""
Bytes: TypeAlias = NDArray[np.uint8]
"""Rows as they are stored in a file."""
Kernel: TypeAlias = Callable[[Rows, NDArray[np.float32] | None], Bytes]
"""Quantizes rows of one expert. The second argument weighs the error of each column (imatrix)."""
Signatures: TypeAlias = Mapping[str, tuple[Any, tuple[Any, ...]]]
"""Functions of a C library: the type of the result, and those of the arguments."""

INT, INT64, SIZE = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
BOOL, STRING, POINTER = ctypes.c_bool, ctypes.c_char_p, ctypes.c_void_p


class _Traits(ctypes.Structure):
    """struct ggml_type_traits (ggml/include/ggml.h)."""

    _fields_ = (
        ("type_name", STRING),
        ("blck_size", INT64),
        ("blck_size_interleave", INT64),
        ("type_size", SIZE),
        ("is_quantized", BOOL),
        ("to_float", ctypes.CFUNCTYPE(None, POINTER, POINTER, INT64)),
        ("from_float_ref", POINTER),
    )


SIGNATURES: Signatures = {
    # function                  result                   arguments (ggml/include/ggml.h)
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), (INT,)),
    "ggml_quantize_init": (None, (INT,)),
    "ggml_quantize_chunk": (SIZE, (INT, POINTER, POINTER, INT64, INT64, INT64, POINTER)),
    "ggml_validate_row_data": (BOOL, (INT, POINTER, SIZE)),
    "ggml_bf16_to_fp32_row": (None, (POINTER, POINTER, INT64)),
    "ggml_fp16_to_fp32_row": (None, (POINTER, POINTER, INT64)),
}


@dataclass(frozen=True)
class Library:
    """A loaded libggml-base."""

    path: Path
    functions: Mapping[str, Any]

    def initialize(self, ggml_type: GGMLType) -> None:
        """Build the tables of a type, once for the life of the process.

        This takes seconds for some types (docs/ggml-findings.md).
        """
        self.functions["ggml_quantize_init"](ggml_type.id)

    def kernel(self, ggml_type: GGMLType) -> Kernel:
        """Return the function that quantizes rows to a type. Initialize the type first."""
        quantize_chunk = self.functions["ggml_quantize_chunk"]

        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> Bytes:
            out = np.empty(ggml_type.bytes(rows.size), np.uint8)
            address = weights.ctypes.data if weights is not None else None
            # `weights` is one row, which serves all rows: so a call never spans two experts.
            size = quantize_chunk(
                ggml_type.id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, address
            )
            assert size == out.size, (ggml_type.name, size, out.size)
            return out

        return quantize

    def to_float(self, ggml_type: GGMLType, data: Bytes, row: int) -> Rows:
        """Convert stored rows to 32-bit floats, as llama-quantize reads them.

        Args:
            ggml_type: How the rows are stored.
            data: The rows, one after the other.
            row: Weights in a row.

        Returns:
            The rows, of shape (rows, ``row``).
        """
        # ggml's traits have no to_float for F32. A view: the rows are not copied.
        if ggml_type.name == "F32":
            return data.view(np.float32).reshape(-1, row)
        n = data.size // ggml_type.block_bytes * ggml_type.block
        out = np.empty(n, np.float32)
        self._find_reader(ggml_type)(data.ctypes.data, out.ctypes.data, n)
        return out.reshape(-1, row)

    def is_valid(self, ggml_type: GGMLType, data: Bytes) -> bool:
        """Whether stored rows are sound for ggml: no scale is NaN or infinite."""
        validate = self.functions["ggml_validate_row_data"]
        return bool(validate(ggml_type.id, data.ctypes.data, data.size))

    def find_type_differences(self) -> Iterator[str]:
        """Yield every type in which the library differs from this project's table."""
        for t in TYPES.values():
            traits = self._read_traits(t)
            expected = t.name, t.block, t.block_bytes
            # ggml spells its types f32, q4_K and iq2_xs.
            actual = traits.type_name.decode().upper(), traits.blck_size, traits.type_size
            if actual != expected:
                yield f"{self.path}: type {t.id}: expected {expected}, found {actual}"

    def _find_reader(self, ggml_type: GGMLType) -> Any:
        # The same choice as llama_tensor_dequantize_impl (llama.cpp's src/llama-quant.cpp).
        direct = {"BF16": "ggml_bf16_to_fp32_row", "F16": "ggml_fp16_to_fp32_row"}
        if name := direct.get(ggml_type.name):
            return self.functions[name]
        return self._read_traits(ggml_type).to_float

    def _read_traits(self, ggml_type: GGMLType) -> Any:
        return self.functions["ggml_get_type_traits"](ggml_type.id).contents


def find_library(tools: Path) -> Path:
    """Return the library that belongs to a folder of tools.

    It lies beside the folder in ``lib``, or among the tools of a build tree. Tools may be links;
    their library is where they point.

    Raises:
        ToolError: There is none. The error lists the places.
    """
    real = [(tools / tool).resolve().parent for tool in toolchain.TOOLS if (tools / tool).exists()]
    places = [
        place
        for folder in dict.fromkeys([tools, tools.resolve(), *real])
        for place in (folder.parent / "lib", folder)
    ]
    path = next((place / NAME for place in places if (place / NAME).is_file()), None)
    if path is None:
        raise ToolError(
            f"{NAME}: missing; looked for it in {', '.join(str(p) for p in dict.fromkeys(places))}"
        )
    return path


@cache
def load_ggml(path: Path) -> Library:
    """Load the library at a path and compare its types with this project's table.

    Raises:
        ToolError: It cannot be loaded, lacks a function, or has another type table.
    """
    library = Library(path, load_functions(path, SIGNATURES))
    if differences := tuple(library.find_type_differences()):
        raise ToolError(*differences)
    return library


def load_functions(path: Path, signatures: Signatures) -> dict[str, Any]:
    """Return functions of a C library, with their types set.

    Args:
        path: The shared library.
        signatures: The functions that are wanted.

    Raises:
        ToolError: The library cannot be loaded, or lacks functions. The error names each.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise ToolError(f"{path}: cannot be loaded ({e})") from e
    if missing := [name for name in signatures if not hasattr(library, name)]:
        raise ToolError(*(f"{path}: {name}: no such function in this library" for name in missing))
    functions = {name: getattr(library, name) for name in signatures}
    for name, (result, arguments) in signatures.items():
        functions[name].restype, functions[name].argtypes = result, arguments
    return functions
