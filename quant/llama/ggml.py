"""The one door to ggml's C library: quantising rows, reading them back, and checking them.

Only ``libggml-base.so`` is opened, which holds the reference kernels that llama-quantize calls too. ctypes releases
Python's lock while a function runs, so threads quantise side by side. What goes in and out are numpy arrays.

ggml ends the whole process where a kernel meets numbers that it cannot place (a NaN in IQ2_XS): call it in a process
that may die.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.errors import ToolError
from quant.llama import toolchain
from quant.llama.types import TYPES, GGMLType

NAME = "libggml-base.so"

Rows: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Kernel: TypeAlias = Callable[[Rows, NDArray[np.float32] | None], Bytes]
"""Rows of one expert and the weight of each of their columns, or none, to the bytes of the stored rows."""


class _Traits(ctypes.Structure):
    """struct ggml_type_traits (ggml/include/ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


_ROWS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
SIGNATURES: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    #  function                 result             arguments
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), (ctypes.c_int,)),
    "ggml_quantize_init": (None, (ctypes.c_int,)),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ),
    ),
    "ggml_validate_row_data": (ctypes.c_bool, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)),
    "ggml_bf16_to_fp32_row": (None, _ROWS),
    "ggml_fp16_to_fp32_row": (None, _ROWS),
}


@dataclass(frozen=True)
class Library:
    """A loaded libggml-base."""

    path: Path
    functions: Mapping[str, Any]

    def initialise(self, ggml_type: GGMLType) -> None:
        """Build the tables of a type, which takes seconds for some; done once for the life of the process."""
        self.functions["ggml_quantize_init"](ggml_type.id)

    def kernel(self, ggml_type: GGMLType) -> Kernel:
        """What turns rows into stored rows of that type."""
        chunk = self.functions["ggml_quantize_chunk"]

        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> Bytes:
            out = np.empty(ggml_type.bytes(rows.size), np.uint8)
            address = weights.ctypes.data if weights is not None else None
            written = chunk(
                ggml_type.id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, address
            )
            assert written == out.size, (ggml_type.name, written, out.size)
            return out

        return quantize

    def to_float(self, ggml_type: GGMLType, data: Bytes, row: int) -> Rows:
        """Stored rows of that length as 32-bit floats, by ggml's own conversion."""
        n = data.size // ggml_type.block_bytes * ggml_type.block
        if ggml_type.name == "F32":
            return data.view(np.float32).reshape(-1, row)
        out = np.empty(n, np.float32)
        self._reader(ggml_type)(data.ctypes.data, out.ctypes.data, n)
        return out.reshape(-1, row)

    def valid(self, ggml_type: GGMLType, data: Bytes) -> bool:
        """Whether ggml finds nothing wrong with stored rows: no scale that is no number."""
        return bool(
            self.functions["ggml_validate_row_data"](ggml_type.id, data.ctypes.data, data.size)
        )

    def _reader(self, ggml_type: GGMLType) -> Any:
        """The function that llama-quantize reads rows of that type with (llama_tensor_dequantize_impl)."""
        direct = {"BF16": "ggml_bf16_to_fp32_row", "F16": "ggml_fp16_to_fp32_row"}.get(
            ggml_type.name
        )
        return self.functions[direct] if direct else self._traits(ggml_type).to_float

    def _traits(self, ggml_type: GGMLType) -> Any:
        return self.functions["ggml_get_type_traits"](ggml_type.id).contents

    def differences(self) -> Iterator[str]:
        """Everything in which this library's types are not those of this project's table."""
        for t in TYPES.values():
            traits = self._traits(t)
            found = (traits.type_name.decode().upper(), traits.blck_size, traits.type_size)
            if found != (t.name, t.block, t.block_bytes):
                yield f"{self.path}: type {t.id}: expected {(t.name, t.block, t.block_bytes)}, found {found}"


def find_library(tools: Path) -> Path:
    """The library that belongs to a folder of tools: beside it in ``lib``, or in the build tree that it is part of.

    Tools may be links: their library is where they are. Raises ToolError with the places where it was looked for.
    """
    real = [(tools / tool).resolve().parent for tool in toolchain.TOOLS if (tools / tool).exists()]
    places = [
        place
        for folder in dict.fromkeys([tools, tools.resolve(), *real])
        for place in (folder.parent / "lib", folder)
    ]
    found = next((place / NAME for place in places if (place / NAME).is_file()), None)
    if found is None:
        raise ToolError(
            f"{NAME}: missing; looked for it in {', '.join(str(p) for p in dict.fromkeys(places))}"
        )
    return found


@cache
def load_ggml(path: Path) -> Library:
    """The library at that path. Raises ToolError that names it, and what it lacks or has otherwise than expected."""
    try:
        dll = ctypes.CDLL(str(path))
    except OSError as e:
        raise ToolError(f"{path}: cannot be loaded ({e})") from e
    missing = [
        f"{path}: {name}: no such function in this library"
        for name in SIGNATURES
        if not hasattr(dll, name)
    ]
    if missing:
        raise ToolError(*missing)
    functions = {name: getattr(dll, name) for name in SIGNATURES}
    for name, (result, arguments) in SIGNATURES.items():
        functions[name].restype, functions[name].argtypes = result, arguments
    library = Library(path, functions)
    if wrong := tuple(library.differences()):
        raise ToolError(*wrong)
    return library
