"""ggml's stored rows of every type, without waiting for ggml's tables."""

from collections.abc import Callable
from typing import TypeAlias

import pytest

from quant.llama import ggml
from quant.llama.ggml import Bytes, Library, Rows
from quant.llama.toolchain import find_toolchain
from quant.llama.types import GGMLType
from quant.quantize.kernels.library import load_library

SLOW_TABLES = frozenset({"IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS"})
"""Types for which ggml computes for seconds before its first block."""
Quantizer: TypeAlias = Callable[[GGMLType, Rows, Rows | None], Bytes]


@pytest.fixture(scope="session")
def library() -> Library:
    return ggml.load_ggml(ggml.find_library(find_toolchain().bin))


@pytest.fixture(scope="session")
def quantize(library: Library) -> Quantizer:
    """Return a function that stores rows in a type, weighted by column, with ggml's bytes.

    The project's kernels write them at once; tests/quant/quantize/kernels compares them with ggml.
    """
    native = load_library()

    def quantize_rows(ggml_type: GGMLType, rows: Rows, weights: Rows | None) -> Bytes:
        if native.sets and native.has(native.sets[0], ggml_type):
            return native.kernel(library, native.sets[0], ggml_type)(rows, weights)[0]
        if ggml_type.name in SLOW_TABLES:
            pytest.skip("the project's kernels were not built, and ggml takes long")
        library.initialize(ggml_type)
        return library.kernel(ggml_type)(rows, weights)

    return quantize_rows
