"""Every kernel writes ggml's bytes, block by block, on every instruction set of this processor."""

import os
import sys
from collections import Counter

import numpy as np
import pytest

from quant.core.errors import InputError
from quant.llama import ggml
from quant.llama.ggml import Rows
from quant.llama.types import TYPES, GGMLType
from quant.plan.load import RECIPES
from quant.quantize.kernels.library import SETS, CountedKernel, NativeLibrary, load_library
from tests.quant.quantize.kernels import samples

NATIVE = load_library()
SERVED = [(i, t) for i in NATIVE.sets for t in TYPES.values() if NATIVE.has(i, t)]
LANES = 16
"""The most superblocks that a kernel works on side by side."""
SLOW_TABLES = frozenset({"IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS"})
"""Types whose tables take ggml seconds; test_grids.py tests them without ggml."""
EVERY_KERNEL = pytest.mark.parametrize(
    ("instructions", "t"),
    [
        pytest.param(
            i, t, id=f"{i}-{t.name}", marks=[pytest.mark.tools] if t.name in SLOW_TABLES else []
        )
        for i, t in SERVED
    ],
)


def count_differences(
    library: ggml.Library, t: GGMLType, kernel: CountedKernel, x: Rows, w: Rows | None
) -> tuple[int, int]:
    """Return how many blocks differ from ggml's, and how many were left to it; all if it would abort."""
    try:
        data, counts = kernel(x, w)
    except InputError:
        return 0, x.size // t.block
    expected = library.kernel(t)(x, w).reshape(-1, t.block_bytes)
    return int((data.reshape(expected.shape) != expected).any(axis=1).sum()), counts.odd


def compare(
    library: ggml.Library, t: GGMLType, kernel: CountedKernel, seed: int, shape: tuple[int, int]
) -> tuple[int, int]:
    """Return how many blocks were compared, and how many were left to ggml.

    None may differ, and no ordinary block may be left to ggml.
    """
    wrong, left, blocks, total = Counter[str](), Counter[str](), 0, 0
    for case in samples.cases(seed, shape):
        if case.w is None and t.needs_imatrix:
            continue
        name = f"{case.weights}, {case.matrix}"
        wrong[name], odd = count_differences(library, t, kernel, case.x, case.w)
        left[name] = odd if odd * 1000 * t.block > case.odd_per_thousand * case.x.size else 0
        blocks, total = blocks + case.x.size // t.block, total + odd
    assert not +wrong
    assert not +left
    return blocks, total


@EVERY_KERNEL
def test_blocks_of_every_distribution_are_ggmls(
    library: ggml.Library, native: NativeLibrary, instructions: str, t: GGMLType
) -> None:
    kernel = native.kernel(library, instructions, t)
    compare(library, t, kernel, 1, (1, 768))


@EVERY_KERNEL
@pytest.mark.parametrize("rows", [1, 5, 60])
def test_different_lanes_do_not_disturb_each_other(
    library: ggml.Library, native: NativeLibrary, instructions: str, t: GGMLType, rows: int
) -> None:
    kernel = native.kernel(library, instructions, t)
    x = samples.mixed(2, 768)[:rows]
    w = np.abs(np.random.default_rng(3).normal(0, 1, 768)).astype(np.float32)
    assert count_differences(library, t, kernel, x, w)[0] == 0


@EVERY_KERNEL
def test_equal_lanes_are_ggmls(
    library: ggml.Library, native: NativeLibrary, instructions: str, t: GGMLType
) -> None:
    """A step that is skipped if no lane needs it: here no other lane makes up for a wrong skip."""
    kernel, wrong = native.kernel(library, instructions, t), Counter[str]()
    for case in samples.cases(11, (1, 2 * 256)):
        if case.w is None and t.needs_imatrix:
            continue
        for at in range(0, case.x.size, 256):
            x, w = case.x[:, at : at + 256], None if case.w is None else case.w[at : at + 256]
            try:
                data, _ = kernel(np.repeat(x, LANES, 0), w)
            except InputError:
                continue
            expected = library.kernel(t)(np.ascontiguousarray(x), w)
            wrong[f"{case.weights}, {case.matrix}"] += int(
                (data.reshape(LANES, -1) != expected).any()
            )
    assert not +wrong


def test_a_minimum_above_all_weights_is_ggmls(library: ggml.Library, native: NativeLibrary) -> None:
    """Found in one of 1000 superblocks without positive weights, with a few dominant columns."""
    all_cases = samples.cases(7, (120, 2304))
    case = next(c for c in all_cases if (c.weights, c.matrix) == ("negative", "spiky"))
    assert case.w is not None
    x = case.x.reshape(-1, 256)[204:205]
    w = case.w.reshape(-1, 256)[204 % 9].copy()
    for i in native.sets:
        kernel = native.kernel(library, i, TYPES["Q2_K"])
        assert count_differences(library, TYPES["Q2_K"], kernel, np.repeat(x, LANES, 0), w)[0] == 0


@EVERY_KERNEL
def test_rows_that_are_no_multiple_of_the_lanes_are_ggmls(
    library: ggml.Library, native: NativeLibrary, instructions: str, t: GGMLType
) -> None:
    kernel = native.kernel(library, instructions, t)
    for row in (t.block, 3 * t.block, 35 * t.block):
        x = np.random.default_rng(row).normal(0, 0.02, (7, row)).astype(np.float32)
        x.flags.writeable = False
        assert count_differences(
            library, t, kernel, x, np.linspace(1, 2, row, dtype=np.float32)
        ) == (0, 0)


@pytest.mark.tools
@EVERY_KERNEL
def test_a_hundred_thousand_superblocks_are_ggmls(
    library: ggml.Library,
    native: NativeLibrary,
    instructions: str,
    t: GGMLType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel = native.kernel(library, instructions, t)
    blocks, odd = compare(library, t, kernel, 4, (96, 2304))
    assert blocks * t.block >= 100_000 * 256
    with capsys.disabled():
        sys.stdout.write(
            f"\n{instructions} {t.name}: {blocks} blocks, {odd} left to ggml ({odd / blocks:.2%}) "
        )


@pytest.mark.tools
@EVERY_KERNEL
def test_the_weights_of_a_trained_model_are_ggmls(
    library: ggml.Library, native: NativeLibrary, instructions: str, t: GGMLType
) -> None:
    kernel = native.kernel(library, instructions, t)
    blocks = 0
    for name, x in samples.real(RECIPES / "models" / "tiny-glm" / "model.safetensors", 64):
        if t.fits(x.shape[1]):
            w = np.random.default_rng(len(name)).lognormal(0, 1, x.shape[1:]).astype(np.float32)
            assert count_differences(library, t, kernel, x, w) == (0, 0), name
            blocks += x.size // t.block
    assert blocks * t.block > 500_000


def test_every_instruction_set_of_this_processor_has_the_same_kernels(
    native: NativeLibrary,
) -> None:
    if os.environ.get("QUANT_KERNELS"):
        pytest.skip("one of them is asked for")
    have = {i: {t.name for t in TYPES.values() if native.has(i, t)} for i in native.sets}
    assert len({frozenset(names) for names in have.values()}) <= 1, have
    assert set(have) <= set(SETS)
