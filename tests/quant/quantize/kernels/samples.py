"""Rows of twenty distributions and column weights of seven, with fixed seeds, to compare kernels on."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.floating[Any]]
Shape = tuple[int, int]
Draw = Callable[[Generator, Shape], Doubles]


def gauss(r: Generator, s: Shape) -> Doubles:
    return r.normal(0, 0.02, s)


def empty_parts(r: Generator, s: Shape) -> Doubles:
    """Return zero rows, half zero rows, and rows with one weight in twenty."""
    x = gauss(r, s)
    x[0::3] *= r.random(x[0::3].shape) < 0.05
    x[1::3] = 0
    x[2::3, : s[1] // 2] = 0
    return x


def bf16(x: Doubles) -> Doubles:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def scaled(r: Generator, s: Shape, block: int, deviation: float) -> Doubles:
    """Return normal weights with a scale for each block."""
    scale = np.exp(r.normal(0, deviation, (s[0], -(-s[1] // block))))
    each: Doubles = np.repeat(scale, block, axis=1)[:, : s[1]]
    return gauss(r, s) * each


WEIGHTS: Mapping[str, Draw] = {
    "gauss": gauss,
    "t2": lambda r, s: r.standard_t(2, s) * 0.01,
    "cauchy": lambda r, s: r.standard_cauchy(s) * 0.01,
    "laplace": lambda r, s: r.laplace(0, 0.02, s),
    "uniform": lambda r, s: r.uniform(-0.1, 0.1, s),
    "positive": lambda r, s: np.abs(gauss(r, s)),
    "negative": lambda r, s: -np.abs(gauss(r, s)),
    "shifted": lambda r, s: gauss(r, s) + 0.1,
    "empty parts": empty_parts,
    "outliers": lambda r, s: gauss(r, s) * np.where(r.random(s) < 0.01, 100, 1),
    "bf16": lambda r, s: bf16(gauss(r, s)),
    "ternary": lambda r, s: r.integers(-1, 2, s) * 0.03,
    "int4 grid": lambda r, s: r.integers(-8, 8, s) * 0.011,
    "constant": lambda r, s: np.full(s, 0.0371),
    "tiny": lambda r, s: gauss(r, s) * 5e-11,
    "denormal": lambda r, s: gauss(r, s) * 5e-38,
    "huge": lambda r, s: gauss(r, s) * 5e13,
    "mixed sizes": lambda r, s: scaled(r, s, 32, 8),
    "sizes of 16": lambda r, s: scaled(r, s, 16, 1),
    "minus zero": lambda r, s: np.where(r.random(s) < 0.3, -0.0, gauss(r, s)),
}
EXTREME = frozenset({"denormal", "huge", "mixed sizes", "empty parts", "tiny", "cauchy"})
"""Distributions whose blocks a kernel may leave to ggml. It leaves none of the others."""


def spiky(r: Generator, n: int) -> Doubles:
    return np.where(r.random(n) < 0.02, 1e4, 1e-3)


MATRICES: Mapping[str, Callable[[Generator, int], Doubles | None]] = {
    "abs": lambda r, n: np.abs(r.normal(0, 1, n)),
    "ones": lambda r, n: np.ones(n),
    "lognormal": lambda r, n: r.lognormal(0, 3, n),
    "some zeros": lambda r, n: np.abs(r.normal(0, 1, n)) * (r.random(n) >= 0.2),
    "spiky": spiky,
    "zeros": lambda r, n: np.zeros(n),
    "none": lambda r, n: None,
}
UNEVEN = frozenset({"some zeros", "spiky"})
"""Column weights with which a kernel may leave a few blocks of any distribution to ggml."""


@dataclass(frozen=True)
class Case:
    """Some rows of one distribution, with column weights."""

    weights: str
    matrix: str
    x: Floats
    w: Floats | None

    @property
    def odd_per_thousand(self) -> int:
        """How many of a thousand blocks may be left to ggml."""
        return 1000 if self.weights in EXTREME else 2 if self.matrix in UNEVEN else 0


def cases(seed: int, shape: Shape) -> Iterator[Case]:
    """Yield every distribution of rows with every distribution of column weights."""
    random = np.random.default_rng(seed)
    for name, draw in WEIGHTS.items():
        for matrix, columns in MATRICES.items():
            x = np.ascontiguousarray(draw(random, shape).astype(np.float32))
            w = columns(random, shape[1])
            yield Case(name, matrix, x, None if w is None else w.astype(np.float32))


def mixed(seed: int, row: int) -> Floats:
    """Return rows of all distributions in random order, so that the lanes of a group differ."""
    random = np.random.default_rng(seed)
    rows = [draw(random, (3, row)).astype(np.float32) for draw in WEIGHTS.values()]
    return np.ascontiguousarray(np.concatenate(rows)[random.permutation(3 * len(rows))])


def real(file: Path, rows: int) -> Iterator[tuple[str, Floats]]:
    """Yield the first rows of every BF16 matrix of a safetensors file."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, about in json.loads(raw[8:start]).items():
        if name != "__metadata__" and about["dtype"] == "BF16" and len(about["shape"]) == 2:
            begin, end = about["data_offsets"]
            numbers = (
                np.frombuffer(raw[start + begin : start + end], np.uint16).astype(np.uint32) << 16
            )
            yield (
                name,
                np.ascontiguousarray(numbers.view(np.float32).reshape(about["shape"])[:rows]),
            )
