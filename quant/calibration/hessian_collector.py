"""A program: read a text with a model by llama.cpp, and sum what goes into its matrices: of each row x, the product x xᵀ.

See :mod:`quant.core.child`.
llama.cpp calls back for every tensor that it computes, as it does for
llama-imatrix; what goes into a matrix then lies in memory, where it is read by the layout of ``ggml_tensor``. That layout
is held against the library before anything is read by it.

A chunk's rows are multiplied in single precision and added up in single precision: double would take twice the memory,
which is what limits this work, and the roundings of a thousand sums (one in a million) are far below what another text
would change.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.calibration.hessian_file import COUNTS, METADATA_KEY
from quant.core import child, progress
from quant.errors import ToolError
from quant.llama import ggml
from quant.llama.ggml_graph import (
    F32,
    GraphLibrary,
    GraphTensor,
    load_graph_library,
    view_tensor,
)
from quant.llama.model import LoadedModel, Numbers, find_bindings

TINY = 1e-300


class HessianSums:
    """Second moments that grow."""

    def __init__(self, matrices: Mapping[str, tuple[int, int]]) -> None:
        """``matrices`` says of each how many experts it has, and how long a row is."""
        # Zeros that nobody touched take no memory.
        self.products = {
            name: np.zeros((experts, n, n), np.float32) for name, (experts, n) in matrices.items()
        }
        self.counts = {name: np.zeros(experts, np.int64) for name, (experts, _) in matrices.items()}
        self.weights, self.squares = (
            {name: np.zeros(experts) for name, (experts, _) in matrices.items()} for _ in "ws"
        )
        """Of each expert's rows: the sum of their weights, and that of their squares."""

    def add(self, name: str, expert: int, rows: Numbers, weights: Numbers | None = None) -> None:
        """Sum some rows of one expert, each counted by its weight; alike where none are given."""
        if not len(rows):
            return
        rows = rows if weights is None else rows * np.sqrt(weights)[:, None]
        product = rows.T @ rows
        if not np.isfinite(product.trace()):
            raise ToolError(
                f"{name}: what goes into it is NaN or infinite: the model says nothing that can be used"
            )
        self.products[name][expert] += product
        self.counts[name][expert] += len(rows)
        self.weights[name][expert] += (
            len(rows) if weights is None else weights.sum(dtype=np.float64)
        )
        self.squares[name][expert] += (
            len(rows) if weights is None else np.square(weights, dtype=np.float64).sum()
        )

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What was seen, as it is written; matrices that the model never used are left out.

        Weights of a matrix are one on average over all of its experts: one that matters more keeps larger moments. Where
        rows count differently, fewer are told than were seen: as many as would say as much if all counted alike (Kish's
        effective sample size).
        """
        found: dict[str, NDArray[Any]] = {}
        for name, products in self.products.items():
            weights, rows = self.weights[name], self.counts[name]
            if not weights.any():
                continue
            told = np.floor(weights**2 / np.maximum(self.squares[name], TINY)).astype(np.int64)
            share = told / np.maximum(rows, 1) * (rows.sum() / weights.sum())
            if (share != 1).any():  # in place: there may be no room for two of them
                products *= share.astype(np.float32)[:, None, None]
                self.weights[name], self.squares[name], self.counts[name] = (
                    told.astype(float),
                    told.astype(float),
                    told,
                )
            found |= {name: products if len(rows) > 1 else products[0], name + COUNTS: told}
        return found


class HessianCollector:
    """Sums the second moments of what goes into matrices; llama.cpp calls it."""

    def __init__(self, library: GraphLibrary, matrices: Mapping[str, tuple[int, int]]) -> None:
        self.library = library
        self.sums = HessianSums(matrices)
        self.failure: BaseException | None = None

    def __call__(self, address: int, ask: bool, _: Any) -> bool:
        """Whether a tensor is wanted; when it is there, sum what it was made of. A failure ends the computation."""
        try:
            node = GraphTensor.from_address(address)
            if node.op not in (self.library.matmul, self.library.expert_matmul):
                return False
            weight = GraphTensor.from_address(node.src[0])
            if (name := weight.name.decode()) not in self.sums.products:
                return False
            if not ask:
                self.see(name, node, weight)
        except BaseException as e:  # it would be lost in llama.cpp
            self.failure = e
            return False
        return True

    def see(self, name: str, node: GraphTensor, weight: GraphTensor) -> None:
        """Sum what a matrix was multiplied with."""
        inputs = GraphTensor.from_address(node.src[1])
        if inputs.type != F32 or not self.library.is_host(inputs):
            place = "main memory" if self.library.is_host(inputs) else "that of a device"
            raise ToolError(
                f"{name}: expected inputs in F32 in main memory, found type {inputs.type} in {place}"
            )
        x = view_tensor(inputs, np.float32)
        if node.op == self.library.expert_matmul:
            ids = view_tensor(GraphTensor.from_address(node.src[2]), np.int32)[0, 0]
            tokens, places = np.divmod(np.argsort(ids, axis=None, kind="stable"), ids.shape[1])
            ends = np.bincount(ids.ravel(), minlength=len(self.sums.counts[name])).cumsum()
            for expert, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
                # One row for all experts of a token, or one for each.
                self.sums.add(
                    name, expert, x[0, tokens[first:last], places[first:last] % x.shape[2]]
                )
        else:
            # As ggml spreads matrices over the inputs: each serves several in a row.
            many, several = weight.ne[3], weight.ne[2]
            parts = x.reshape(many, -1, several, x.shape[1] // several, *x.shape[2:]).swapaxes(1, 2)
            for expert, rows in enumerate(parts.reshape(many * several, -1, x.shape[3])):
                self.sums.add(name, expert, rows)


def write_hessians(sums: HessianSums, job: Mapping[str, Any], chunks: int) -> None:
    """The file that a job asks for."""
    from safetensors.numpy import save_file

    about = json.dumps({**job["about"], "chunks": chunks}, sort_keys=True)
    save_file(sums.tensors(), job["out"], {METADATA_KEY: about})


def collect_job(job: Mapping[str, Any], _: Path) -> int:
    """Do what a job says, and return how many chunks the text filled; nothing is written for none."""
    library = load_graph_library(find_bindings() / ggml.NAME)
    observer = HessianCollector(library, job["matrices"])
    scorer = LoadedModel(job["model"], job["context"], job["threads"], observer)
    rows = scorer.tokenize_chunks(Path(job["text"]).read_bytes())[: job["chunks"]]
    for n, row in enumerate(rows):
        # What follows every token: of the others the last block would not go on to reckon.
        scorer.decode_chunk(row, range(scorer.context))
        if observer.failure:
            raise observer.failure
        progress.report_progress((n + 1) / len(rows))
    scorer.close()
    if len(rows):
        write_hessians(observer.sums, job, len(rows))
    return len(rows)


if __name__ == "__main__":
    child.run_job(collect_job)
