"""The door to the project's own kernels: the shared library that lies beside this file, when it was built.

Its exported names are the table of what there is: ``avx512_iq4_nl`` writes IQ4_NL with AVX-512. ctypes releases Python's
lock while a kernel runs, and a kernel shares nothing with another call but tables that are built once.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.errors import InputError
from quant.llama import ggml
from quant.llama.ggml import Bytes, Rows
from quant.llama.types import GGMLType

PATH = Path(__file__).with_name("libkernels.so")
SETS = {"avx512": 2, "avx2": 1, "neon": 4}
"""Instruction sets, the widest first, and what says in the library's answer that the processor has them."""
SETTING = "QUANT_KERNELS"
"""The environment variable that names the one to use, or ``ggml``."""


@dataclass(frozen=True)
class KernelCounts:
    """What a call met."""

    odd: int
    """Blocks (or rows) that ggml itself wrote, because of numbers that only it need answer for."""
    faulty: int
    """Blocks that meet a fault of ggml's, which is written as ggml writes it."""


class _Counts(ctypes.Structure):
    _fields_ = (("odd", ctypes.c_int64), ("faulty", ctypes.c_int64), ("refused", ctypes.c_int64))


CountedKernel = Callable[[Rows, NDArray[np.float32] | None], tuple[Bytes, KernelCounts]]
"""A kernel that also says what it met. Raises InputError for rows on which ggml would end the process."""


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded library, or why there is none."""

    dll: Any
    sets: tuple[str, ...]
    """What this processor can run, the fastest first."""
    problem: str = ""
    path: Path = PATH

    def has(self, instructions: str, ggml_type: GGMLType) -> bool:
        """Whether there is a kernel for that type."""
        return self.dll is not None and hasattr(self.dll, _name(instructions, ggml_type))

    def kernel(
        self, library: ggml.Library, instructions: str, ggml_type: GGMLType
    ) -> CountedKernel:
        """A kernel, with ``library`` for the blocks that it leaves to ggml."""
        function = getattr(self.dll, _name(instructions, ggml_type))
        function.restype = None
        function.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.POINTER(_Counts),
        )
        chunk = ctypes.cast(library.functions["ggml_quantize_chunk"], ctypes.c_void_p)

        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> tuple[Bytes, KernelCounts]:
            _check(ggml_type, rows, weights)
            out, counts = np.empty(ggml_type.bytes(rows.size), np.uint8), _Counts()
            address = weights.ctypes.data if weights is not None else None
            function(
                rows.ctypes.data, out.ctypes.data, *rows.shape, address, chunk, ctypes.byref(counts)
            )
            if counts.refused:
                raise InputError(
                    f"{counts.refused} of {rows.size // ggml_type.block} blocks cannot be made {ggml_type.name}, and ggml "
                    "would end the process: their weights or those of the imatrix are too large, or no numbers"
                )
            return out, KernelCounts(counts.odd, counts.faulty)

        return quantize

    def flushes(self) -> bool:
        """Whether this thread's arithmetic is not the plain one: denormals flushed, or another rounding."""
        return self.dll is not None and bool(self.dll.quant_floats_are_odd())


def _name(instructions: str, ggml_type: GGMLType) -> str:
    return f"{instructions}_{ggml_type.name.lower()}"


def _check(ggml_type: GGMLType, rows: Rows, weights: NDArray[np.float32] | None) -> None:
    """Native code reads what it is told to; so the arrays have to be what they are taken for."""
    assert rows.dtype == np.float32 and rows.ndim == 2 and rows.flags.c_contiguous, (
        rows.dtype,
        rows.shape,
    )
    assert ggml_type.fits(rows.shape[1]), (ggml_type.name, rows.shape)
    if weights is not None:
        assert weights.dtype == np.float32 and weights.shape == rows.shape[1:], (
            weights.dtype,
            weights.shape,
        )
        assert weights.flags.c_contiguous


@cache
def load_library(path: Path = PATH) -> NativeLibrary:
    """The library at that path, with what of it this processor can run, in the order of preference.

    Raises InputError for an instruction set in ``QUANT_KERNELS`` that there is not.
    """
    wanted = os.environ.get(SETTING, "")
    if wanted and wanted not in (*SETS, "ggml"):
        raise InputError(f"{SETTING}: expected one of ggml, {', '.join(SETS)}, found {wanted!r}")
    if wanted == "ggml":
        return NativeLibrary(None, (), f"{SETTING} says ggml")
    if not path.is_file():
        return NativeLibrary(
            None, (), f"{path} is not there: the package was built without a C++ compiler"
        )
    try:
        dll = ctypes.CDLL(str(path))
        has = dll.quant_processor()
    except (OSError, AttributeError) as e:
        return NativeLibrary(None, (), f"{path} cannot be loaded ({e})")
    usable = tuple(name for name, bit in SETS.items() if has & bit)
    if wanted:
        if wanted not in usable:
            raise InputError(
                f"{SETTING}={wanted}: this processor has {', '.join(usable) or 'none of them'}"
            )
        return NativeLibrary(dll, (wanted,), path=path)
    return NativeLibrary(
        dll, usable, "" if usable else "the processor has none of " + ", ".join(SETS), path
    )
