"""What the engine calls for GPTQ: it finds the Hessian of an expert, and refines rows with it."""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from quant.calibration.hessian_file import Hessians
from quant.llama.ggml import Bytes, Rows
from quant.llama.gguf import TensorSpec
from quant.llama.tensors import EMBEDDINGS
from quant.llama.types import GGMLType
from quant.quantize.gptq.descent import refine_rows
from quant.quantize.gptq.formats import FORMATS
from quant.quantize.gptq.hessian import Hessian

CACHE_SIZE = 8
"""Hessians that are kept in memory. Threads work on neighboring chunks, which share theirs."""


class ErrorCompensator:
    """Refine ggml's stored rows with GPTQ where the Hessian is known. Threads may share it."""

    def __init__(self, hessians: Hessians) -> None:
        """Use the Hessians of an open file."""
        self.hessians = hessians
        self.lock = threading.Lock()
        self.cache: OrderedDict[tuple[str, int], Hessian | None] = OrderedDict()

    @classmethod
    def open(cls, path: Path, base_digest: str | None = None) -> "ErrorCompensator":
        """Open a file of Hessians.

        Args:
            path: A file of Hessians (see :mod:`quant.calibration.hessian_file`).
            base_digest: The sha256 that the file's base must have; None accepts any base.

        Raises:
            InputError: The file is not one of Hessians, or belongs to another base.
        """
        return cls(Hessians.open(path, base_digest))

    def find_hessian(self, tensor: TensorSpec, expert: int) -> Hessian | None:
        """Return the Hessian of an expert's inputs, or None if no calibration row reached it.

        Rows of the embedding are looked up, not multiplied, so they have no inputs. Unless the file
        has gradients for them, their Hessian is the identity.
        """
        key = tensor.name, expert
        # Reading under the lock: several threads want the same Hessian at the same time.
        with self.lock:
            if key not in self.cache:
                self.cache[key] = self._read(tensor, expert)
                while len(self.cache) > CACHE_SIZE:
                    # The least recently used one, because every hit moves its entry to the end.
                    self.cache.popitem(last=False)
            self.cache.move_to_end(key)
            return self.cache[key]

    def refine(self, ggml_type: GGMLType, rows: Rows, data: Bytes, hessian: Hessian) -> Bytes:
        """Return the rows refined by :func:`~quant.quantize.gptq.descent.refine_rows`.

        Types without a block format (F16, TQ1_0, MXFP4 and the like) keep ``data`` as it is.
        """
        return refine_rows(ggml_type, rows, data, hessian) if ggml_type.name in FORMATS else data

    def _read(self, tensor: TensorSpec, expert: int) -> Hessian | None:
        # Below the least number of rows the file returns None: a Hessian of few rows overfits.
        mean = self.hessians.read_mean(tensor.name, expert)
        if mean is not None:
            return Hessian(mean)
        if tensor.name in EMBEDDINGS:
            return Hessian(np.eye(tensor.shape[0], dtype=np.float32))
        return None
