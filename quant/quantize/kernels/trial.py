"""The trial of a kernel: some hundred blocks, compared byte for byte with the loaded ggml.

It notices a ggml that was built otherwise (with fused multiply-adds, say) or whose algorithm
changed, and a processor or compiler on which a kernel does not do what it did where it was tested.
The outcome is kept in the user's cache, under the digests of both libraries and of this file,
because for some types ggml takes seconds before it writes its first block.
"""

import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.core import files
from quant.core.format import hash_texts, to_pretty_json
from quant.llama import ggml
from quant.llama.ggml import Rows
from quant.llama.types import GGMLType
from quant.quantize.kernels.library import CountedKernel

ROWS, ROW = 40, 768
SLOW_TYPES = frozenset({"IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"})
"""Types for which ggml computes for seconds before its first block."""


@cache
def make_rows() -> Rows:
    """Return rows of many distributions: heavy-tailed, shifted, coarse, with outliers or zeros."""
    random = np.random.default_rng(20)
    # 768 weights are three superblocks a row; 40 rows fill every lane, with some to spare.
    x = random.normal(0, 0.02, (ROWS, ROW))
    x[4:12] = random.standard_t(2, (8, ROW)) * 0.01
    x[12:15] += 0.05
    x[15:18] = np.round(x[15:18] * 200) / 200
    x[18:21] *= np.where(random.random((3, ROW)) < 0.01, 100, 1)
    x[21:25] *= np.repeat(random.lognormal(0, 3, (4, ROW // 32)), 32, axis=1)
    x[25, 256:320] = 0
    x[26] = np.abs(x[26])
    x[27] = -np.abs(x[27])
    return np.ascontiguousarray(x.astype(np.float32))


def make_weights(ggml_type: GGMLType) -> tuple[NDArray[np.float32] | None, ...]:
    """Return column weights to try: uneven ones, and None if the type needs no imatrix."""
    uneven = np.random.default_rng(21).lognormal(0, 1, ROW).astype(np.float32)
    return (uneven,) if ggml_type.needs_imatrix else (uneven, None)


def compare_with_ggml(library: ggml.Library, ggml_type: GGMLType, kernel: CountedKernel) -> str:
    """Return how a kernel's bytes differ from ggml's; an empty string if they do not."""
    for w in make_weights(ggml_type):
        expected = library.kernel(ggml_type)(make_rows(), w).reshape(-1, ggml_type.block_bytes)
        actual = kernel(make_rows(), w)[0].reshape(expected.shape)
        wrong = int((expected != actual).any(axis=1).sum())
        if wrong:
            how = "with" if w is not None else "without"
            return (
                f"{wrong} of {len(expected)} blocks {how} weights of the columns are not as "
                f"{library.path} writes them"
            )
    return ""


def find_difference(
    library: ggml.Library, ggml_type: GGMLType, kernel: CountedKernel, name: str, native: Path
) -> str:
    """Return how a kernel's bytes differ from ggml's, from the cache if the trial was made before.

    Args:
        library: The loaded ggml.
        ggml_type: The type to try.
        kernel: The kernel to try.
        name: The kernel's name, such as ``avx2 Q4_K``.
        native: The path of the kernels' shared library.
    """
    difference = read_cached(library, name, native)
    if difference is None:
        difference = compare_with_ggml(library, ggml_type, kernel)
        outcome = {"kernel": name, "library": str(library.path), "difference": difference}
        # If it cannot be kept, or another process keeps it now, the next process tries again.
        with suppress(OSError):
            files.write_text(_cache_path(library, name, native), to_pretty_json(outcome))
    return difference


def read_cached(library: ggml.Library, name: str, native: Path) -> str | None:
    """Return the outcome of an earlier trial, or None."""
    try:
        outcome = json.loads(_cache_path(library, name, native).read_text())
        return str(outcome["difference"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cache_path(library: ggml.Library, name: str, native: Path) -> Path:
    key = [_digest(library.path), _digest(native), name, _digest(Path(__file__))]
    return cache_folder() / hash_texts(key)


def cache_folder() -> Path:
    """Return the folder of the outcomes. It may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "gguf-foundry" / "kernels"


@cache
def _digest(path: Path) -> str:
    return files.hash_file(path)
