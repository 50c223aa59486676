"""A program: run a text through a model forward and backward, and sum gradient-weighted Hessians.

:mod:`quant.core.child` starts it. Forward, the input of every block is kept on disk. Backward, each
block is computed again from its input and passes its gradient to the block before. So memory holds
the F32 weights of one block, and the Hessians of all.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from quant.calibration.gradients.glm4moe import (
    BlockContext,
    apply_rms_norm,
    compute_block,
    compute_rotation,
)
from quant.calibration.gradients.shape import ModelShape
from quant.calibration.hessian_sums import HessianSums, write_hessians
from quant.core import child, progress
from quant.core.disk import reserve_file
from quant.core.errors import ToolError
from quant.llama.gguf import read_headers
from quant.llama.model import LoadedModel, Numbers
from quant.llama.tensors import OUTPUT, TOKEN_EMBEDDING

Inputs: TypeAlias = tuple[str, int, Numbers, Numbers]
"""A matrix, its expert, the rows that went in, and the weight of each row."""
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class ModelWeights:
    """The tensors of a GGUF model in F32. Those that were read are kept until :meth:`release`."""

    def __init__(self, first: Path) -> None:
        headers = read_headers(first)
        self.metadata = headers[0].metadata
        self.tensors = {t.name: (header, t) for header in headers for t in header.tensors}
        self.data = {h.path: np.memmap(h.path, np.uint8, "r") for h in headers}
        self.cache: dict[tuple[str, int], Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, expert: int = 0) -> Tensor:
        """Return a tensor, (rows, columns) or (columns,); of an expert if there are several."""
        if (name, expert) not in self.cache:
            _, spec = self.tensors[name]
            columns, rows = spec.shape[0], prod(spec.shape[1:2])
            values = self.rows(name, range(expert * rows, (expert + 1) * rows))
            self.cache[name, expert] = values if len(spec.shape) > 1 else values.view(columns)
        return self.cache[name, expert]

    def rows(self, name: str, wanted: range | NDArray[np.int32]) -> Tensor:
        """Return some rows of a tensor, (rows, columns)."""
        header, spec = self.tensors[name]
        start = header.data_start + spec.offset
        row_bytes = spec.type.bytes(spec.shape[0])
        stored = self.data[header.path][start : start + spec.bytes].reshape(-1, row_bytes)
        # A slice reads consecutive rows as one. It is copied, because torch warns about memory
        # that it may not write to.
        part = stored[wanted.start : wanted.stop] if isinstance(wanted, range) else stored[wanted]
        return torch.from_numpy(np.array(part)).view(FLOATS[spec.type.name]).float()

    def release(self) -> None:
        """Drop the tensors that were read."""
        self.cache.clear()


class GradientRecorder:
    """Multiplies by matrices, and records their inputs and weights when the gradient comes back."""

    def __init__(self, weights: ModelWeights, wanted: Collection[str]) -> None:
        self.weights, self.wanted = weights, wanted
        self.inputs: list[Inputs] = []

    def __call__(self, name: str, x: Tensor, expert: int = 0) -> Tensor:
        """Return x multiplied by the matrix, (tokens, rows of the matrix)."""
        output = functional.linear(x, self.weights.read(name, expert))
        if output.requires_grad and name in self.wanted:
            record = partial(self.record, name, expert, x.detach())
            # torch has no types for functions that start or hook gradients: here and below.
            output.register_hook(record)  # type: ignore[no-untyped-call]
        return output

    def record(self, name: str, expert: int, x: Tensor, gradient: Tensor) -> None:
        """Record the inputs of a matrix, (tokens, columns), with |g|² of each token as weight."""
        self.inputs.append((name, expert, x.numpy(), gradient.square().sum(1).numpy()))


class ModelPass:
    """The forward and backward pass of a text.

    Each chunk runs on one thread. Results are added up in the order of the chunks, so the sums do
    not depend on the number of threads.
    """

    def __init__(
        self,
        weights: ModelWeights,
        sums: HessianSums,
        tokens: NDArray[np.int32],
        folder: Path,
        threads: int,
    ) -> None:
        """Reserve disk space for the inputs and gradients of the blocks.

        Args:
            weights: The model.
            sums: Where Hessians are added up.
            tokens: Token ids, (chunks, context).
            folder: For the inputs and gradients.
            threads: Chunks that run at a time.
        """
        self.shape = ModelShape.from_metadata(weights.metadata)
        self.weights, self.sums, self.tokens = weights, sums, tokens
        self.rotation = compute_rotation(self.shape, tokens.shape[1])
        size = (*tokens.shape, self.shape.width)
        self.inputs = _map_file(folder / "inputs.npy", (self.shape.blocks + 1, *size))
        """The input of every block, and the output of the last."""
        self.gradients = _map_file(folder / "gradients.npy", size)
        self.threads, self.pool, self.steps = threads, ThreadPoolExecutor(threads), 0

    def run_forward(self) -> None:
        """Keep the input of every block, and the output of the last."""
        for chunk, row in enumerate(self.tokens):
            self.inputs[0, chunk] = self.weights.rows(TOKEN_EMBEDDING, row).numpy()
        for n in range(self.shape.blocks):
            self._run_step(partial(self._forward_block, n))

    def run_output(self) -> None:
        """Sample a token at every position, and keep the gradient of its log likelihood."""
        self._run_step(self._backward_output)

    def run_backward(self) -> None:
        """Pass the gradients on from the last block to the embedding."""
        for n in reversed(range(self.shape.blocks)):
            self._run_step(partial(self._backward_block, n))
        # Without an output tensor the embedding is the output matrix, and has its Hessian already.
        if TOKEN_EMBEDDING in self.sums.products and OUTPUT in self.weights:
            for gradient in self.gradients:
                self.sums.add(TOKEN_EMBEDDING, 0, gradient)

    def _run_step(self, work: Callable[[int], Sequence[Inputs]]) -> None:
        """Do one step for all chunks, add up their inputs, and drop the weights."""
        for first in range(0, len(self.tokens), self.threads):
            rows: dict[tuple[str, int], list[tuple[Numbers, Numbers]]] = {}
            chunks = range(len(self.tokens))[first : first + self.threads]
            for inputs in self.pool.map(work, chunks):
                for name, expert, x, weights in inputs:
                    rows.setdefault((name, expert), []).append((x, weights))
            # Each matrix is added to by one thread only.
            for _ in self.pool.map(self._add, rows.items()):
                pass
        self.weights.release()
        self.steps += 1
        progress.report_progress(self.steps / (2 * self.shape.blocks + 1))

    def _add(self, item: tuple[tuple[str, int], list[tuple[Numbers, Numbers]]]) -> None:
        (name, expert), parts = item
        for x, weights in parts:
            self.sums.add(name, expert, x, weights)

    def _forward_block(self, n: int, chunk: int) -> Sequence[Inputs]:
        with torch.no_grad():
            x = self._read_input(n, chunk)
            self.inputs[n + 1, chunk] = self._compute_block(n, x, self._make_recorder()).numpy()
        return ()

    def _backward_output(self, chunk: int) -> Sequence[Inputs]:
        recorder = self._make_recorder()
        name = OUTPUT if OUTPUT in self.weights else TOKEN_EMBEDDING
        x = self._read_input(self.shape.blocks, chunk).requires_grad_()
        norm = self.weights.read("output_norm.weight")
        logits = recorder(name, apply_rms_norm(self.shape, x, norm))
        slope = logits.detach().softmax(-1)
        if not slope.isfinite().all():
            raise ToolError(f"{name}: its outputs are NaN or infinite: the model is broken")
        # The seed is the chunk's number, so a chunk samples the same tokens on any thread.
        seeded = torch.Generator().manual_seed(chunk)
        sampled = torch.multinomial(slope, 1, generator=seeded)
        # d(-log p[y]) / d logits = softmax - onehot(y)
        slope.scatter_add_(1, sampled, torch.full(sampled.shape, -1.0))
        logits.backward(slope)  # type: ignore[no-untyped-call]  # see GradientRecorder
        self._keep_gradient(chunk, x)
        return recorder.inputs

    def _backward_block(self, n: int, chunk: int) -> Sequence[Inputs]:
        recorder, x = self._make_recorder(), self._read_input(n, chunk).requires_grad_()
        gradient = torch.from_numpy(np.array(self.gradients[chunk]))
        output = self._compute_block(n, x, recorder)
        output.backward(gradient)  # type: ignore[no-untyped-call]  # see GradientRecorder
        self._keep_gradient(chunk, x)
        return recorder.inputs

    def _make_recorder(self) -> GradientRecorder:
        return GradientRecorder(self.weights, self.sums.products.keys())

    def _read_input(self, n: int, chunk: int) -> Tensor:
        return torch.from_numpy(np.array(self.inputs[n, chunk]))

    def _compute_block(self, n: int, x: Tensor, product: GradientRecorder) -> Tensor:
        return compute_block(BlockContext(self.shape, self.rotation, self.weights, product), n, x)

    def _keep_gradient(self, chunk: int, x: Tensor) -> None:
        assert x.grad is not None
        self.gradients[chunk] = x.grad.numpy()


def _map_file(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array in a file, whose disk space is reserved.

    Writing to a map on a full disk would end the process with SIGBUS, without a message.
    """
    array: NDArray[np.float32] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    reserve_file(path, advice="take fewer chunks, or free some")
    return array


def collect_gradient_job(job: dict[str, Any], folder: Path) -> int:
    """Do a job, and return the number of chunks that were read. Nothing is written for none."""
    # Threads run chunks, not parts of a product: how a product is split changes its rounding.
    torch.set_num_threads(1)
    model = LoadedModel(job["model"], job["context"], job["threads"])
    # llama.cpp only tokenizes here. Its memory is released before the arrays are reserved.
    tokens = model.tokenize_chunks(Path(job["text"]).read_bytes())[: job["chunks"]]
    model.close()
    if not len(tokens):
        return 0
    sums, weights = HessianSums(job["matrices"]), ModelWeights(Path(job["model"]))
    model_pass = ModelPass(weights, sums, tokens, folder, job["threads"])
    model_pass.run_forward()
    model_pass.run_output()
    model_pass.run_backward()
    write_hessians(sums, job, len(tokens))
    return len(tokens)


if __name__ == "__main__":
    child.run_job(collect_gradient_job)
