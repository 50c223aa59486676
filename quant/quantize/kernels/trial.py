"""The trial of a kernel: some hundred blocks, compared byte for byte with what the loaded ggml writes.

It finds a ggml that was built otherwise (with fused multiply-adds, say) or whose algorithm is another by now, and a
processor or compiler on which a kernel is not what it was where it was tested. What came out is kept in the user's cache,
under the digest of everything that took part; for some types ggml takes seconds before it writes its first block.
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
SLOW = frozenset({"IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"})
"""Types for which ggml computes for seconds before its first block."""


@cache
def make_rows() -> Rows:
    """Rows of different nature: smooth, heavy-tailed, shifted, coarse, with outliers, partly empty."""
    random = np.random.default_rng(20)
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
    """Weights of the columns: uneven ones, and none where the type does without."""
    uneven = np.random.default_rng(21).lognormal(0, 1, ROW).astype(np.float32)
    return (uneven,) if ggml_type.needs_imatrix else (uneven, None)


def find_kernel_difference(
    library: ggml.Library, ggml_type: GGMLType, kernel: CountedKernel
) -> str:
    """In what a kernel differs from ggml; empty when in nothing."""
    for w in make_weights(ggml_type):
        expected = library.kernel(ggml_type)(make_rows(), w).reshape(-1, ggml_type.block_bytes)
        found = kernel(make_rows(), w)[0].reshape(expected.shape)
        wrong = int((expected != found).any(axis=1).sum())
        if wrong:
            how = "with" if w is not None else "without"
            return f"{wrong} of {len(expected)} blocks {how} weights of the columns are not as {library.path} writes them"
    return ""


def cached_difference(
    library: ggml.Library, ggml_type: GGMLType, kernel: CountedKernel, name: str, native: Path
) -> str:
    """The same, from the cache if these two libraries were compared before for the kernel of that name."""
    found = is_cached(library, name, native)
    if found is None:
        found = find_kernel_difference(library, ggml_type, kernel)
        place = _place(library, name, native)
        with suppress(
            OSError
        ):  # no place to keep it, or another process is keeping it: the next one tries again
            files.write_text(
                place,
                to_pretty_json({"kernel": name, "library": str(library.path), "difference": found}),
            )
    return found


def is_cached(library: ggml.Library, name: str, native: Path) -> str | None:
    """What an earlier trial found, if there was one."""
    try:
        return str(json.loads(_place(library, name, native).read_text())["difference"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _place(library: ggml.Library, name: str, native: Path) -> Path:
    key = [_digest(library.path), _digest(native), name, _digest(Path(__file__))]
    return cache_folder() / hash_texts(key)


def cache_folder() -> Path:
    """Where outcomes are kept; may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (
        (Path(base) if Path(base).is_absolute() else Path.home() / ".cache")
        / "gguf-foundry"
        / "kernels"
    )


@cache
def _digest(path: Path) -> str:
    return files.hash_file(path)
