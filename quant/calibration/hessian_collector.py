"""A program: read a text with llama.cpp, and add up the Hessian of each matrix's inputs.

:mod:`quant.core.child` starts it. llama.cpp calls back for every tensor that it computes, as it
does for llama-imatrix. The inputs of a matrix multiplication are then read where they lie in
memory, by the layout of ``ggml_tensor`` (:mod:`quant.llama.ggml_graph`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quant.calibration.hessian_sums import HessianSums, MatrixSizes, write_hessians
from quant.core import child, progress
from quant.core.errors import ToolError
from quant.llama import ggml
from quant.llama.ggml_graph import (
    F32,
    GraphLibrary,
    GraphTensor,
    load_graph_library,
    view_tensor,
)
from quant.llama.model import LoadedModel, find_bindings


class HessianCollector:
    """Adds up the Hessians while llama.cpp runs: it is called for every node of the graph."""

    def __init__(self, library: GraphLibrary, sizes: MatrixSizes) -> None:
        self.library = library
        self.sums = HessianSums(sizes)
        self.failure: BaseException | None = None

    def __call__(self, address: int, ask: bool, _: Any) -> bool:
        """Handle a node, as ``ggml_backend_sched_eval_callback`` (ggml-backend.h).

        Args:
            address: Address of the node's ``ggml_tensor``.
            ask: Whether llama.cpp only asks if the node's data is wanted.

        Returns:
            Whether the data is wanted, or whether to go on. A failure ends the computation.
        """
        try:
            node = GraphTensor.from_address(address)
            if node.op not in (self.library.matmul, self.library.expert_matmul):
                return False
            weight = GraphTensor.from_address(node.src[0])
            if (name := weight.name.decode()) not in self.sums.products:
                return False
            if not ask:
                self.add_inputs(name, node, weight)
        except BaseException as e:  # C code between here and the caller would lose it
            self.failure = e
            return False
        return True

    def add_inputs(self, name: str, node: GraphTensor, weight: GraphTensor) -> None:
        """Add the inputs of a matrix multiplication."""
        inputs = GraphTensor.from_address(node.src[1])
        if inputs.type != F32 or not self.library.is_host(inputs):
            place = "main memory" if self.library.is_host(inputs) else "that of a device"
            raise ToolError(
                f"{name}: expected inputs in F32 in main memory, found type {inputs.type} in"
                f" {place}"
            )
        x = view_tensor(inputs, np.float32)
        if node.op == self.library.expert_matmul:
            # ids[token, place] is the expert; sorted, each expert's rows follow each other. A
            # token has one row for all of its experts (gate, up), or one for each (down).
            ids = view_tensor(GraphTensor.from_address(node.src[2]), np.int32)[0, 0]
            tokens, places = np.divmod(np.argsort(ids, axis=None, kind="stable"), ids.shape[1])
            ends = np.bincount(ids.ravel(), minlength=len(self.sums.counts[name])).cumsum()
            for expert, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
                rows = x[0, tokens[first:last], places[first:last] % x.shape[2]]
                self.sums.add(name, expert, rows)
        else:
            # ggml broadcasts matrices over the inputs: each serves several consecutive ones
            # (ggml_compute_forward_mul_mat: i02 = i12 / r2).
            many, several = weight.ne[3], weight.ne[2]
            parts = x.reshape(many, -1, several, x.shape[1] // several, *x.shape[2:]).swapaxes(1, 2)
            for expert, rows in enumerate(parts.reshape(many * several, -1, x.shape[3])):
                self.sums.add(name, expert, rows)


def collect_job(job: Mapping[str, Any], _: Path) -> int:
    """Do a job, and return the number of chunks that were read. Nothing is written for none."""
    library = load_graph_library(find_bindings() / ggml.NAME)
    collector = HessianCollector(library, job["matrices"])
    model = LoadedModel(job["model"], job["context"], job["threads"], collector)
    chunks = model.tokenize_chunks(Path(job["text"]).read_bytes())[: job["chunks"]]
    for n, chunk in enumerate(chunks):
        # Outputs are asked for at every position: llama.cpp drops the others before the last
        # block's feed-forward part, whose inputs would be missing.
        model.decode_chunk(chunk, range(model.context))
        if collector.failure:
            raise collector.failure
        progress.report_progress((n + 1) / len(chunks))
    model.close()
    if len(chunks):
        write_hessians(collector.sums, job, len(chunks))
    return len(chunks)


if __name__ == "__main__":
    child.run_job(collect_job)
