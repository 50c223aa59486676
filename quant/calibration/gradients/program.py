"""A program: read a text with a model forward and backward by torch, and sum moments that are counted by gradients.

See :mod:`quant.core.child`.
Forward, what every block is given is kept on the disk; backward, each block
is read again and hands its gradient on to the one before. So the weights of one block are in memory at a time, in single
precision, and the sums of all.
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

from quant.calibration.gradients.glm4moe import apply_rms_norm, compute_block, compute_rotation
from quant.calibration.gradients.shape import ModelShape
from quant.calibration.hessian_collector import HessianSums, write_hessians
from quant.core import child, progress
from quant.core.disk import reserve_file
from quant.errors import ToolError
from quant.llama.gguf import read_headers
from quant.llama.model import LoadedModel, Numbers
from quant.llama.tensors import OUTPUT, TOKEN_EMBEDDING

Seen: TypeAlias = tuple[str, int, Numbers, Numbers]
"""A matrix, its expert, the rows that went in, and how much each counts."""
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class ModelWeights:
    """The tensors of a GGUF file and its shards, in single precision; those of a block are held."""

    def __init__(self, first: Path) -> None:
        headers = read_headers(first)
        self.metadata = headers[0].metadata
        self.where = {t.name: (header, t) for header in headers for t in header.tensors}
        self.data = {h.path: np.memmap(h.path, np.uint8, "r") for h in headers}
        self.held: dict[tuple[str, int], Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def of(self, name: str, expert: int = 0) -> Tensor:
        """The numbers of a tensor, (rows, row); of one expert, where there are several."""
        if (name, expert) not in self.held:
            _, spec = self.where[name]
            row, many = spec.shape[0], prod(spec.shape[1:2])
            found = self.rows(name, range(expert * many, (expert + 1) * many))
            self.held[name, expert] = found if len(spec.shape) > 1 else found.view(row)
        return self.held[name, expert]

    def rows(self, name: str, wanted: range | NDArray[np.int32]) -> Tensor:
        """Some rows of a tensor."""
        header, spec = self.where[name]
        start = header.data_start + spec.offset
        stored = self.data[header.path][start : start + spec.bytes].reshape(
            -1, spec.type.bytes(spec.shape[0])
        )
        # A copy, since torch warns of what it may not write to; rows that follow each other are read as one.
        found = stored[wanted.start : wanted.stop] if isinstance(wanted, range) else stored[wanted]
        return torch.from_numpy(np.array(found)).view(FLOATS[spec.type.name]).float()

    def release(self) -> None:
        """Forget the numbers that are held."""
        self.held.clear()


class GradientRecorder:
    """Multiplies by matrices; when the gradient comes back, it is noted what went in, and how much each row counts."""

    def __init__(self, tensors: ModelWeights, wanted: Collection[str]) -> None:
        self.tensors, self.wanted = tensors, wanted
        self.seen: list[Seen] = []

    def __call__(self, name: str, x: Tensor, expert: int = 0) -> Tensor:
        """What comes out of the matrix."""
        made = functional.linear(x, self.tensors.of(name, expert))
        if made.requires_grad and name in self.wanted:
            # torch says no types of what starts its gradients: the three silenced lines here.
            made.register_hook(partial(self.see, name, expert, x.detach()))  # type: ignore[no-untyped-call]
        return made

    def see(self, name: str, expert: int, x: Tensor, gradient: Tensor) -> None:
        """Note what went into a matrix, (tokens, row), and the gradients behind it."""
        self.seen.append((name, expert, x.numpy(), gradient.square().sum(1).numpy()))


class ModelPass:
    """The way of a text through a model and back.

    Chunks go side by side, each on one thread, and are summed in their order: the sums do not depend on the threads.
    """

    def __init__(
        self,
        tensors: ModelWeights,
        sums: HessianSums,
        tokens: NDArray[np.int32],
        folder: Path,
        threads: int,
    ) -> None:
        self.shape, self.tensors, self.sums, self.tokens = (
            ModelShape.of(tensors.metadata),
            tensors,
            sums,
            tokens,
        )
        self.turn = compute_rotation(self.shape, tokens.shape[1])
        size = (*tokens.shape, self.shape.width)
        self.given = _on_disk(folder / "given.npy", (self.shape.blocks + 1, *size))
        self.gradients = _on_disk(folder / "gradients.npy", size)
        self.threads, self.pool, self.steps = threads, ThreadPoolExecutor(threads), 0

    def forward(self) -> None:
        """Keep what every block is given, and what the last one makes."""
        for chunk, row in enumerate(self.tokens):
            self.given[0, chunk] = self.tensors.rows(TOKEN_EMBEDDING, row).numpy()
        for n in range(self.shape.blocks):
            self._step(partial(self._forward, n))

    def output(self) -> None:
        """Draw a word for every token by what the model says, and keep how its likelihood moves with the last block."""
        self._step(self._drawn)

    def backward(self) -> None:
        """Hand the gradients on from the last block to the embedding."""
        for n in reversed(range(self.shape.blocks)):
            self._step(partial(self._backward, n))
        if TOKEN_EMBEDDING in self.sums.products and OUTPUT in self.tensors:
            for gradient in self.gradients:
                self.sums.add(TOKEN_EMBEDDING, 0, gradient)

    def _step(self, work: Callable[[int], Sequence[Seen]]) -> None:
        """A part of the way, for all chunks."""
        for first in range(0, len(self.tokens), self.threads):
            rows: dict[tuple[str, int], list[tuple[Numbers, Numbers]]] = {}
            for seen in self.pool.map(work, range(len(self.tokens))[first : first + self.threads]):
                for name, expert, x, weights in seen:
                    rows.setdefault((name, expert), []).append((x, weights))
            for _ in self.pool.map(self._sum, rows.items()):
                pass
        self.tensors.release()
        self.steps += 1
        progress.report_progress(self.steps / (2 * self.shape.blocks + 1))

    def _sum(self, found: tuple[tuple[str, int], list[tuple[Numbers, Numbers]]]) -> None:
        for x, weights in found[1]:
            self.sums.add(*found[0], x, weights)

    def _forward(self, n: int, chunk: int) -> Sequence[Seen]:
        with torch.no_grad():
            self.given[n + 1, chunk] = self._block(
                n, self._given(n, chunk), self._watched()
            ).numpy()
        return ()

    def _drawn(self, chunk: int) -> Sequence[Seen]:
        watched, name = self._watched(), OUTPUT if OUTPUT in self.tensors else TOKEN_EMBEDDING
        x = self._given(self.shape.blocks, chunk).requires_grad_()
        made = watched(name, apply_rms_norm(self.shape, x, self.tensors.of("output_norm.weight")))
        slope = made.detach().softmax(-1)
        if not slope.isfinite().all():
            raise ToolError(
                f"{name}: what comes out is NaN or infinite: the model says nothing that can be used"
            )
        words = torch.multinomial(slope, 1, generator=torch.Generator().manual_seed(chunk))
        # Of minus the logarithm of the word's likelihood.
        made.backward(slope.scatter_add_(1, words, torch.full(words.shape, -1.0)))  # type: ignore[no-untyped-call]
        self._keep(chunk, x)
        return watched.seen

    def _backward(self, n: int, chunk: int) -> Sequence[Seen]:
        watched, x = self._watched(), self._given(n, chunk).requires_grad_()
        self._block(n, x, watched).backward(torch.from_numpy(np.array(self.gradients[chunk])))  # type: ignore[no-untyped-call]
        self._keep(chunk, x)
        return watched.seen

    def _watched(self) -> GradientRecorder:
        return GradientRecorder(self.tensors, self.sums.products.keys())

    def _given(self, n: int, chunk: int) -> Tensor:
        return torch.from_numpy(np.array(self.given[n, chunk]))

    def _block(self, n: int, x: Tensor, product: GradientRecorder) -> Tensor:
        return compute_block(self.shape, n, x, self.turn, self.tensors, product)

    def _keep(self, chunk: int, x: Tensor) -> None:
        assert x.grad is not None
        self.gradients[chunk] = x.grad.numpy()


def _on_disk(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An array of nothing, for which there is room: a full disk would end the process without a word later."""
    found: NDArray[np.float32] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    reserve_file(path, advice="take fewer chunks, or free some")
    return found


def collect_gradient_job(job: dict[str, Any], folder: Path) -> int:
    """Do what a job says, and return how many chunks the text filled; nothing is written for none."""
    torch.set_num_threads(1)  # by chunks, not within products, whose sums would then depend on it
    scorer = LoadedModel(job["model"], job["context"], job["threads"])
    tokens = scorer.tokenize_chunks(Path(job["text"]).read_bytes())[: job["chunks"]]
    scorer.close()
    if not len(tokens):
        return 0
    sums = HessianSums(job["matrices"])
    passage = ModelPass(ModelWeights(Path(job["model"])), sums, tokens, folder, job["threads"])
    passage.forward()
    passage.output()
    passage.backward()
    write_hessians(sums, job, len(tokens))
    return len(tokens)


if __name__ == "__main__":
    child.run_job(collect_gradient_job)
