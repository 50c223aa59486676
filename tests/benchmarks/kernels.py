"""Compare the kernels with ggml's functions on one core: ``python -m tests.benchmarks.kernels > kernels.md``.

The functions run in turn on the same rows. The best of several turns counts, in thread time, so
other work on the machine matters little. ggml's tables are built before anything is measured.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from quant.llama import ggml
from quant.llama.ggml import Rows
from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES, GGMLType
from quant.plan.load import RECIPES
from quant.quantize.kernels.library import NativeLibrary, load_library
from tests.benchmarks.measured import machine
from tests.quant.quantize.kernels import samples

ROWS, ROW = 64, 4096
TURNS = 7
LONG = 0.25
"""Seconds that every function runs at least."""


def rows() -> Rows:
    """Return normal weights, as many as fit into the cache of a core."""
    return np.random.default_rng(1).normal(0, 0.02, (ROWS, ROW)).astype(np.float32)


def trained() -> Rows:
    """Return rows of the largest matrix of the tiny model."""
    file = RECIPES / "models" / "tiny-glm" / "model.safetensors"
    matrices = [x for _, x in samples.real(file, 10_000) if x.shape[1] % 256 == 0]
    x = max(matrices, key=lambda x: x.size)
    return np.ascontiguousarray(x[: ROWS * ROW // x.shape[1]])


def columns(x: Rows) -> Rows:
    """Return uneven column weights."""
    return np.random.default_rng(2).lognormal(0, 1, x.shape[1:]).astype(np.float32)


def speeds(functions: Sequence[Callable[[], object]], weights: int) -> list[float]:
    """Return the best speed of each function, in million weights per second."""
    best, spent = [float("inf")] * len(functions), [0.0] * len(functions)
    turn = 0
    while turn < TURNS or min(spent) < LONG:
        for i, function in enumerate(functions):
            began = time.thread_time()
            function()
            took = time.thread_time() - began
            best[i], spent[i] = min(best[i], took), spent[i] + took
        turn += 1
        if max(spent) > 20 * LONG and turn >= 3:
            break
    return [weights / b / 1e6 for b in best]


def line(library: ggml.Library, native: NativeLibrary, t: GGMLType, x: Rows, w: Rows | None) -> str:
    """Return the line of a type: speeds of ggml and of each instruction set, and their ratios."""
    sets = [i for i in native.sets if native.has(i, t)]
    functions: list[Callable[[], object]] = [lambda: library.kernel(t)(x, w)]
    for i in sets:
        kernel = native.kernel(library, i, t)
        functions.append(lambda kernel=kernel: kernel(x, w))  # type: ignore[misc]  # mypy cannot infer the type of a lambda with a default
    base, *ours = speeds(functions, x.size)
    cells = [f"{v:.0f} | {v / base:.1f}x | {2**20 / v / 1e6 * 1e3:.1f}" for v in ours]
    return f"| {t.name} | {base:.1f} | {' | '.join(cells)} |"


def table(
    library: ggml.Library, native: NativeLibrary, types: Sequence[GGMLType], x: Rows, w: Rows | None
) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    heads = [f"{i} | ratio | ms for 2²⁰" for i in native.sets]
    yield f"| type | ggml | {' | '.join(heads)} |"
    yield "|---|---:|" + "---:|" * (3 * len(heads))
    for t in types:
        if w is not None or not t.needs_imatrix:
            library.initialize(t)
            yield line(library, native, t, x, w)


def main() -> None:
    """Measure, and print the text of kernels.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="only these")
    names = parser.parse_args().types
    library, native = ggml.load_ggml(ggml.find_library(find_toolchain().bin)), load_library()
    served = [t for t in TYPES.values() if any(native.has(i, t) for i in native.sets)]
    types = [t for t in served if not names or t.name in names]
    smooth, real = rows(), trained()
    write(
        f"# Kernels against ggml, one core\n\n{machine()}; {time.strftime('%Y-%m-%d')}. Million weights a second.\n"
    )
    for title, x, w in (
        ("Normal weights, with an imatrix", smooth, columns(smooth)),
        ("Trained weights (tiny-glm), with an imatrix", real, columns(real)),
        ("Normal weights, without an imatrix", smooth, None),
    ):
        write(f"\n## {title}\n\n")
        for text in table(library, native, types, x, w):
            write(text + "\n")


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
