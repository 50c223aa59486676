"""Load the project's kernels: the shared library beside this file, if it was built.

Its exported names say what there is: ``avx512_iq4_nl`` writes IQ4_NL with AVX-512. ctypes releases
Python's lock while a kernel runs. Calls share nothing but tables that are built once.
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

from quant.core.errors import InputError
from quant.llama import ggml
from quant.llama.ggml import Bytes, Rows
from quant.llama.types import GGMLType

PATH = Path(__file__).with_name("libkernels.so")
SETS = {"avx512": 2, "avx2": 1, "neon": 4}
"""Instruction sets, the widest first, with the bit of quant_processor() that stands for each."""
SETTING = "QUANT_KERNELS"
"""The environment variable that chooses an instruction set, or ``ggml``."""


@dataclass(frozen=True)
class KernelCounts:
    """What a call of a kernel met."""

    odd: int
    """Blocks (or rows) that were left to ggml: infinities, NaN, denormals and the like."""
    faulty: int
    """Blocks that met a fault of ggml, which the kernel reproduces."""


class _Counts(ctypes.Structure):
    _fields_ = (("odd", ctypes.c_int64), ("faulty", ctypes.c_int64), ("refused", ctypes.c_int64))


CountedKernel = Callable[[Rows, NDArray[np.float32] | None], tuple[Bytes, KernelCounts]]
"""A kernel that also returns its counts. Raises InputError for rows on which ggml would abort."""


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded library, or the reason why there is none."""

    dll: Any
    sets: tuple[str, ...]
    """Instruction sets that this processor can run, the fastest first."""
    problem: str = ""
    """Why no kernel can be used; empty if some can."""
    path: Path = PATH

    def has(self, instructions: str, ggml_type: GGMLType) -> bool:
        """Return whether there is a kernel for the type."""
        return self.dll is not None and hasattr(self.dll, _name(instructions, ggml_type))

    def kernel(
        self, library: ggml.Library, instructions: str, ggml_type: GGMLType
    ) -> CountedKernel:
        """Return a kernel; ``library`` is the ggml to which it leaves odd blocks."""
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
        # Passed as a pointer, so that the kernels need not be linked to a ggml, and leave odd
        # blocks to the one that is loaded.
        chunk = ctypes.cast(library.functions["ggml_quantize_chunk"], ctypes.c_void_p)

        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> tuple[Bytes, KernelCounts]:
            _check_arrays(ggml_type, rows, weights)
            out, counts = np.empty(ggml_type.bytes(rows.size), np.uint8), _Counts()
            address = weights.ctypes.data if weights is not None else None
            function(
                rows.ctypes.data, out.ctypes.data, *rows.shape, address, chunk, ctypes.byref(counts)
            )
            if counts.refused:
                raise InputError(
                    f"{counts.refused} of {rows.size // ggml_type.block} blocks cannot be made "
                    f"{ggml_type.name}, and ggml would abort: their weights or those of the "
                    "imatrix are too large, or not finite"
                )
            return out, KernelCounts(counts.odd, counts.faulty)

        return quantize

    def flushes_denormals(self) -> bool:
        """Return whether this thread flushes denormals to zero, or does not round to nearest."""
        return self.dll is not None and bool(self.dll.quant_floats_are_odd())


def _name(instructions: str, ggml_type: GGMLType) -> str:
    return f"{instructions}_{ggml_type.name.lower()}"


def _check_arrays(ggml_type: GGMLType, rows: Rows, weights: NDArray[np.float32] | None) -> None:
    # Native code trusts the pointers: a wrong type or shape here would be a wrong memory access.
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
    """Load the library at a path, and find which of its instruction sets this processor can run.

    Raises:
        InputError: ``QUANT_KERNELS`` names an instruction set that does not exist or cannot run.
    """
    chosen = os.environ.get(SETTING, "")
    if chosen and chosen not in (*SETS, "ggml"):
        raise InputError(f"{SETTING}: expected one of ggml, {', '.join(SETS)}, found {chosen!r}")
    if chosen == "ggml":
        return NativeLibrary(None, (), f"{SETTING} says ggml")
    if not path.is_file():
        return NativeLibrary(
            None, (), f"{path} is not there: the package was built without a C++ compiler"
        )
    # A library of another architecture, or an older one without the query, is as good as none.
    try:
        dll = ctypes.CDLL(str(path))
        has = dll.quant_processor()
    except (OSError, AttributeError) as e:
        return NativeLibrary(None, (), f"{path} cannot be loaded ({e})")
    usable = tuple(name for name, bit in SETS.items() if has & bit)
    if chosen:
        if chosen not in usable:
            raise InputError(
                f"{SETTING}={chosen}: this processor has {', '.join(usable) or 'none of them'}"
            )
        return NativeLibrary(dll, (chosen,), path=path)
    return NativeLibrary(
        dll, usable, "" if usable else "the processor has none of " + ", ".join(SETS), path
    )
