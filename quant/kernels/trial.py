"""The trial of a kernel: some hundred blocks, compared byte for byte with what the loaded ggml writes.

It finds a ggml that was built otherwise (with fused multiply-adds, say) or whose algorithm is another by now, and a
processor or compiler on which a kernel is not what it was where it was tested.
"""

import numpy as np
from numpy.typing import NDArray

from quant import ggml
from quant.ggml import Rows
from quant.ggml_types import GGMLType
from quant.kernels.library import Counted

ROW = 768
ROWS = 24


def rows() -> Rows:
    """Rows of different nature: smooth, heavy-tailed, shifted, coarse, with outliers, partly empty."""
    random = np.random.default_rng(20)
    x = random.normal(0, 0.02, (ROWS, ROW))
    x[4:8] = random.standard_t(2, (4, ROW)) * 0.01
    x[8:11] += 0.05
    x[11:14] = np.round(x[11:14] * 200) / 200
    x[14:17] *= np.where(random.random((3, ROW)) < 0.01, 100, 1)
    x[17:19] *= np.repeat(random.lognormal(0, 3, (2, ROW // 32)), 32, axis=1)
    x[19, 256:320] = 0
    x[20] = np.abs(x[20])
    x[21] = -np.abs(x[21])
    return np.ascontiguousarray(x.astype(np.float32))


def weights(ggml_type: GGMLType) -> tuple[NDArray[np.float32] | None, ...]:
    """Weights of the columns: uneven ones, and none where the type does without."""
    random = np.random.default_rng(21)
    uneven = random.lognormal(0, 1, ROW).astype(np.float32)
    return (uneven,) if ggml_type.needs_imatrix else (uneven, None)


def difference(library: ggml.Library, ggml_type: GGMLType, kernel: Counted) -> str:
    """In what a kernel differs from ggml; empty when in nothing."""
    x = rows()
    for w in weights(ggml_type):
        expected = library.kernel(ggml_type)(x, w).reshape(-1, ggml_type.block_bytes)
        found = kernel(x, w)[0].reshape(expected.shape)
        wrong = int((expected != found).any(axis=1).sum())
        if wrong:
            how = "with" if w is not None else "without"
            return f"{wrong} of {len(expected)} blocks {how} weights are not as {library.path} writes them"
    return ""
