"""Which rows feedback can help, and the metric of each: what the engine asks while the data passes."""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from quant.calibration.hessian_file import Hessians
from quant.llama.ggml import Bytes, Rows
from quant.llama.gguf import TensorSpec
from quant.llama.tensors import EMBEDDINGS
from quant.llama.types import GGMLType
from quant.quantize.gptq.descent import Metric
from quant.quantize.gptq.descent import refine as refined
from quant.quantize.gptq.formats import FORMS

KEPT = 8
"""Metrics that are held: threads work on neighbouring pieces, which share theirs."""


class ErrorCompensator:
    """Brings ggml's rows nearer to the original where the inputs of their matrix are known. May be shared by threads."""

    def __init__(self, moments: Hessians) -> None:
        self.moments = moments
        self.lock = threading.Lock()
        self.kept: OrderedDict[tuple[str, int], Metric | None] = OrderedDict()

    @staticmethod
    def open(path: Path, base_digest: str | None = None) -> "ErrorCompensator":
        """With the moments of a file. Raises InputError for another file, and for those of another base."""
        return ErrorCompensator(Hessians.open(path, base_digest))

    def metric(self, tensor: TensorSpec, expert: int) -> Metric | None:
        """How errors in an expert's columns add up; nothing where nobody saw its inputs.

        Rows that are looked up, as those of the embedding, have no inputs: unless gradients say more, their columns count
        alike.
        """
        key = tensor.name, expert
        with self.lock:
            if key not in self.kept:
                self.kept[key] = self._found(tensor, expert)
                while len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return self.kept[key]

    def refine(self, ggml_type: GGMLType, rows: Rows, data: Bytes, metric: Metric) -> Bytes:
        """What :func:`quant.quantize.gptq.descent.refine` makes of the rows; as they are where the type has no form."""
        return refined(ggml_type, rows, data, metric) if ggml_type.name in FORMS else data

    def _found(self, tensor: TensorSpec, expert: int) -> Metric | None:
        mean = self.moments.read_mean(tensor.name, expert)
        if mean is not None:
            return Metric(mean)
        if tensor.name in EMBEDDINGS:
            return Metric(np.eye(tensor.shape[0], dtype=np.float32))
        return None
