"""A program: read a text with a model by llama.cpp, and sum what goes into its matrices: of each row x, the product x xᵀ.

See :mod:`quant.core.child`.
llama.cpp calls back for every tensor that it computes, as it does for
llama-imatrix; what goes into a matrix then lies in memory, where it is read by the layout of ``ggml_tensor``. That layout
is held against the library before anything is read by it.

A chunk's rows are multiplied in single precision and added up in single precision: double would take twice the memory,
which is what limits this work, and the roundings of a thousand sums (one in a million) are far below what another text
would change.
"""

import ctypes
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from quant.calibration.hessian_file import COUNTS, METADATA_KEY
from quant.core import child, progress
from quant.errors import ToolError
from quant.llama.model import LIBRARY, LoadedModel, Numbers
from quant.llama.types import TYPES

NAME = "libggml-base.so"
TINY = 1e-300
INT32 = 26
"""The type of numbers of experts; see ``enum ggml_type``."""


class GraphTensor(ctypes.Structure):
    """``struct ggml_tensor`` (ggml.h) as far as it is read here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _Room(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


P, I64 = ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # function                      result           arguments
    "ggml_init": (P, (_Room,)),
    "ggml_free": (None, (P,)),
    "ggml_new_tensor_3d": (P, (P, ctypes.c_int, I64, I64, I64)),
    "ggml_set_name": (P, (P, ctypes.c_char_p)),
    "ggml_get_data": (P, (P,)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_mul_mat_id": (P, (P, P, P, P)),
    "ggml_op_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "ggml_type_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, (P,)),
}


class GraphLibrary:
    """The ggml that llama.cpp is loaded with, and the numbers of the two operations that multiply by a matrix."""

    def __init__(self) -> None:
        self.path = Path(os.environ[LIBRARY]) / NAME
        try:
            library = ctypes.CDLL(str(self.path))
        except OSError as e:
            raise ToolError(
                f"{self.path}: cannot be loaded ({e}); run `uv sync` in the project's folder"
            ) from e
        if missing := [name for name in SIGNATURES if not hasattr(library, name)]:
            self._fail("its functions", ", ".join(SIGNATURES), f"none called {', '.join(missing)}")
        self.call: dict[str, Any] = {name: getattr(library, name) for name in SIGNATURES}
        for name, (result, arguments) in SIGNATURES.items():
            self.call[name].restype, self.call[name].argtypes = result, arguments
        self.plain, self.by_expert = self._operations()

    def is_host(self, tensor: GraphTensor) -> bool:
        """Whether a tensor lies in main memory."""
        return bool(self.call["ggml_backend_buffer_is_host"](tensor.buffer))

    def _operations(self) -> tuple[int, int]:
        """Make tensors whose every number is known, and read them back. The process ends when one is another."""
        c, float32 = self.call, TYPES["F32"].id
        room = c["ggml_init"](_Room(2**16, None, False))
        a, x, ids = (
            c["ggml_new_tensor_3d"](room, kind, *shape)
            for kind, shape in ((float32, (6, 5, 4)), (float32, (6, 2, 3)), (INT32, (2, 3, 1)))
        )
        one = c["ggml_new_tensor_3d"](room, float32, 6, 7, 1)
        c["ggml_set_name"](a, b"blk.0.test.weight")
        told, plain, by_expert = (
            GraphTensor.from_address(t)
            for t in (a, c["ggml_mul_mat"](room, one, x), c["ggml_mul_mat_id"](room, a, x, ids))
        )
        expected = {
            "name": b"blk.0.test.weight",
            "type": float32,
            "ne": [6, 5, 4, 1],
            "nb": [4, 24, 120, 480],
            "data": c["ggml_get_data"](a),
            "src": [a, x, ids],
            "plain": b"MUL_MAT",
            "by expert": b"MUL_MAT_ID",
            "types": (b"f32", b"i32"),
        }
        found = {
            "name": told.name,
            "type": told.type,
            "ne": [*told.ne],
            "nb": [*told.nb],
            "data": told.data,
            "src": by_expert.src[:3],
            "plain": c["ggml_op_name"](plain.op),
            "by expert": c["ggml_op_name"](by_expert.op),
            "types": (c["ggml_type_name"](float32), c["ggml_type_name"](INT32)),
        }
        for what, value in expected.items():
            if found[what] != value:
                self._fail(f"ggml_tensor: {what}", value, found[what])
        numbers = plain.op, by_expert.op
        c["ggml_free"](room)
        return numbers

    def _fail(self, what: str, expected: object, found: object) -> NoReturn:
        raise ToolError(
            f"{self.path}: {what}: expected {expected}, found {found}: of another version than the lock file's;"
            " run `uv sync` in the project's folder"
        )


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
            if node.op not in (self.library.plain, self.library.by_expert):
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
        if inputs.type != TYPES["F32"].id or not self.library.is_host(inputs):
            place = "main memory" if self.library.is_host(inputs) else "that of a device"
            raise ToolError(
                f"{name}: expected inputs in F32 in main memory, found type {inputs.type} in {place}"
            )
        x = view_tensor(inputs, np.float32)
        if node.op == self.library.by_expert:
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


def view_tensor(tensor: GraphTensor, dtype: DTypeLike) -> NDArray[Any]:
    """The numbers of a tensor where they lie, its first dimension last."""
    shape, strides, item = [*tensor.ne][::-1], [*tensor.nb][::-1], np.dtype(dtype).itemsize
    span = item + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return np.ndarray(shape, dtype, (ctypes.c_char * span).from_address(tensor.data), 0, strides)


def write_hessians(sums: HessianSums, job: Mapping[str, Any], chunks: int) -> None:
    """The file that a job asks for."""
    from safetensors.numpy import save_file

    about = json.dumps({**job["about"], "chunks": chunks}, sort_keys=True)
    save_file(sums.tensors(), job["out"], {METADATA_KEY: about})


def collect_job(job: Mapping[str, Any], _: Path) -> int:
    """Do what a job says, and return how many chunks the text filled; nothing is written for none."""
    os.environ.setdefault(LIBRARY, str(Path(sys.prefix) / "lib"))
    observer = HessianCollector(GraphLibrary(), job["matrices"])
    scorer = LoadedModel(job["model"], job["context"], job["threads"], observer)
    rows = scorer.tokens(Path(job["text"]).read_bytes())[: job["chunks"]]
    for n, row in enumerate(rows):
        # What follows every token: of the others the last block would not go on to reckon.
        scorer.read(row, range(scorer.context))
        if observer.failure:
            raise observer.failure
        progress.report_progress((n + 1) / len(rows))
    scorer.close()
    if len(rows):
        write_hessians(observer.sums, job, len(rows))
    return len(rows)


if __name__ == "__main__":
    child.run_job(collect_job)
