"""GPTQ and coordinate descent: the output's error falls, in as many bytes, and rises for no row."""

from collections.abc import Callable

import numpy as np
import pytest

from quant.llama.ggml import Bytes, Library, Rows
from quant.llama.types import TYPES
from quant.quantize.gptq import descent
from quant.quantize.gptq.descent import RowState, compensate_errors, refine_rows
from quant.quantize.gptq.formats import FORMATS
from quant.quantize.gptq.hessian import Hessian
from quant.quantize.gptq.rounding import find_nearest
from tests.quant.quantize.gptq.conftest import Quantizer

ROW, ROWS = 256, 24
GAIN = 0.8
"""The error may be this fraction of ggml's. All types stay far below it with these inputs."""
EVERY_TYPE = pytest.mark.parametrize("name", sorted(FORMATS))


@pytest.fixture(scope="module")
def rows() -> Rows:
    return np.asarray(np.random.default_rng(2).standard_t(5, (ROWS, ROW)) * 0.02, np.float32)


@pytest.fixture(scope="module")
def inputs() -> Rows:
    """Inputs as in a model: correlated, and larger in some columns than in others."""
    rng = np.random.default_rng(3)
    correlated = rng.standard_normal((2000, 40)) @ rng.standard_normal((40, ROW))
    correlated += 0.5 * rng.standard_normal((2000, ROW))
    return np.asarray(correlated * np.exp(rng.normal(0, 0.7, ROW)), np.float32)


@pytest.fixture(scope="module")
def hessian(inputs: Rows) -> Hessian:
    return Hessian(inputs.T @ inputs / np.float32(len(inputs)))


Store = Callable[[str, Rows, Hessian], Bytes]


@pytest.fixture(scope="module")
def store(quantize: Quantizer) -> Store:
    """Return a function that stores rows as ggml does, with the diagonal as the imatrix."""

    def store_rows(name: str, rows: Rows, hessian: Hessian) -> Bytes:
        diagonal = np.ascontiguousarray(np.diagonal(hessian.matrix))
        return quantize(TYPES[name], rows, diagonal)

    return store_rows


@EVERY_TYPE
def test_the_error_of_the_output_falls_and_the_loss_of_no_row_rises(
    name: str, library: Library, store: Store, rows: Rows, hessian: Hessian, inputs: Rows
) -> None:
    before = store(name, rows, hessian)
    after = refine_rows(TYPES[name], rows, before, hessian)
    assert after.size == before.size
    assert library.is_valid(TYPES[name], after)
    errors = [library.to_float(TYPES[name], data, ROW) - rows for data in (before, after)]
    loss_before, loss_after = (hessian.loss(e.T) for e in errors)
    assert (loss_after <= loss_before * (1 + 1e-4)).all()
    output_before, output_after = (float(np.square(e @ inputs.T).sum()) for e in errors)
    assert output_after < GAIN * output_before


def test_the_same_rows_give_the_same_bytes(store: Store, rows: Rows, hessian: Hessian) -> None:
    data = store("Q4_K", rows, hessian)
    first = refine_rows(TYPES["Q4_K"], rows, data, hessian)
    second = refine_rows(TYPES["Q4_K"], rows, data, hessian)
    assert (first == second).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "Q8_0"])
def test_with_a_diagonal_hessian_each_weight_gets_its_nearest_level(
    name: str, store: Store, rows: Rows
) -> None:
    diagonal = np.random.default_rng(5).uniform(0.5, 2, ROW).astype(np.float32)
    hessian = Hessian(np.diag(diagonal))
    state = RowState.unpack(TYPES[name], rows, store(name, rows, hessian))
    scale, offset, _ = state.scales()
    compensate_errors(state, hessian)
    levels = FORMATS[name].levels
    assert levels is not None
    scaled = scale != 0
    values = ((state.weights + offset) / np.where(scaled, scale, 1)).astype(np.float32)
    assert (state.level == find_nearest(values, levels))[scaled].all()


@EVERY_TYPE
def test_rows_of_zeros_stay_zeros(
    name: str, library: Library, store: Store, hessian: Hessian
) -> None:
    zeros = np.zeros((3, ROW), np.float32)
    after = refine_rows(TYPES[name], zeros, store(name, zeros, hessian), hessian)
    assert not library.to_float(TYPES[name], after, ROW).any()


@EVERY_TYPE
def test_columns_without_any_input_do_no_harm(
    name: str, library: Library, store: Store, rows: Rows, hessian: Hessian
) -> None:
    matrix = hessian.matrix.copy()
    matrix[:32], matrix[:, :32] = 0, 0
    partly_silent = Hessian(matrix)
    before = store(name, rows, partly_silent)
    after = refine_rows(TYPES[name], rows, before, partly_silent)
    loss_before, loss_after = (
        partly_silent.loss((library.to_float(TYPES[name], data, ROW) - rows).T).sum()
        for data in (before, after)
    )
    assert np.isfinite(loss_after) and loss_after < loss_before


@pytest.mark.parametrize(
    "step", [descent.choose_levels, descent.fit_scales, descent.fit_block_scales]
)
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ2_S", "IQ3_XXS"])
def test_each_step_alone_lowers_the_loss_of_most_rows_and_raises_it_for_none(
    name: str,
    step: Callable[[RowState, Hessian], None],
    store: Store,
    rows: Rows,
    hessian: Hessian,
) -> None:
    state = RowState.unpack(TYPES[name], rows, store(name, rows, hessian))
    before = hessian.loss(state.error())
    step(state, hessian)
    after = hessian.loss(state.error())
    assert (after <= before * (1 + 1e-4)).all()
    assert (after < before * (1 - 1e-3)).mean() > 0.5


@pytest.mark.parametrize("name", ["Q4_K", "Q2_K", "IQ3_S", "IQ1_S"])
def test_later_groups_compensate_the_errors_of_earlier_ones(
    name: str, store: Store, rows: Rows, hessian: Hessian
) -> None:
    state = RowState.unpack(TYPES[name], rows, store(name, rows, hessian))
    before = hessian.loss(state.error()).sum()
    compensate_errors(state, hessian)
    assert hessian.loss(state.error()).sum() < before / 2


def test_a_row_whose_loss_did_not_fall_keeps_its_bytes(
    monkeypatch: pytest.MonkeyPatch, store: Store, rows: Rows, hessian: Hessian
) -> None:
    def spoil(state: RowState, _: Hessian) -> None:
        state.level[:, ::2] = 0

    for step in ("choose_levels", "fit_scales", "fit_block_scales"):
        monkeypatch.setattr(descent, step, lambda state, hessian: None)
    monkeypatch.setattr(descent, "compensate_errors", spoil)
    before = store("Q4_K", rows, hessian)
    assert (refine_rows(TYPES["Q4_K"], rows, before, hessian) == before).all()
