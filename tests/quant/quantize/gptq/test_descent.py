"""Feedback: what comes out of a matrix is nearer to what it was, in the same bytes, and never further."""

from collections.abc import Callable

import numpy as np
import pytest

from quant.llama import ggml
from quant.llama.ggml import Bytes, Library, Rows
from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES
from quant.quantize.gptq import descent
from quant.quantize.gptq.descent import Metric, State, compensate_errors, refine
from quant.quantize.gptq.formats import FORMS
from quant.quantize.gptq.rounding import find_nearest
from quant.quantize.kernels import Kernels

ROW, ROWS = 256, 24
GAIN = 0.8
"""Of ggml's error at most, with inputs as alike as these; all types reach it by far."""


@pytest.fixture(scope="module")
def library() -> Library:
    return ggml.load_ggml(ggml.find_library(find_toolchain().bin))


@pytest.fixture(scope="module")
def kernels(library: Library) -> Kernels:
    return Kernels(library)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return np.asarray(np.random.default_rng(2).standard_t(5, (ROWS, ROW)) * 0.02, np.float32)


@pytest.fixture(scope="module")
def inputs() -> Rows:
    """As in a model: a few directions say most, and some columns are louder than others."""
    rng = np.random.default_rng(3)
    said = rng.standard_normal((2000, 40)) @ rng.standard_normal(
        (40, ROW)
    ) + 0.5 * rng.standard_normal((2000, ROW))
    return np.asarray(said * np.exp(rng.normal(0, 0.7, ROW)), np.float32)


@pytest.fixture(scope="module")
def metric(inputs: Rows) -> Metric:
    return Metric(inputs.T @ inputs / np.float32(len(inputs)))


def stored(kernels: Kernels, name: str, rows: Rows, metric: Metric) -> Bytes:
    return kernels.kernel(TYPES[name])(rows, np.ascontiguousarray(np.diagonal(metric.moments)))


@pytest.mark.parametrize("name", sorted(FORMS))
def test_the_output_is_nearer_and_no_row_is_further(
    name: str, library: Library, kernels: Kernels, rows: Rows, metric: Metric, inputs: Rows
) -> None:
    before = stored(kernels, name, rows, metric)
    after = refine(TYPES[name], rows, before, metric)
    assert after.size == before.size
    assert library.valid(TYPES[name], after)
    lost = [
        metric.loss((library.to_float(TYPES[name], data, ROW) - rows).T) for data in (before, after)
    ]
    assert (lost[1] <= lost[0] * (1 + 1e-4)).all()
    seen = [
        float(np.square((library.to_float(TYPES[name], d, ROW) - rows) @ inputs.T).sum())
        for d in (before, after)
    ]
    assert seen[1] < GAIN * seen[0]


def test_the_same_rows_give_the_same_bytes(kernels: Kernels, rows: Rows, metric: Metric) -> None:
    data = stored(kernels, "Q4_K", rows, metric)
    whole = refine(TYPES["Q4_K"], rows, data, metric)
    again = refine(TYPES["Q4_K"], rows, data, metric)
    assert (whole == again).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "Q8_0"])
def test_where_inputs_have_nothing_in_common_each_weight_gets_its_nearest_level(
    name: str, kernels: Kernels, rows: Rows
) -> None:
    alone = Metric(np.diag(np.random.default_rng(5).uniform(0.5, 2, ROW)).astype(np.float32))
    state = State.of(TYPES[name], rows, stored(kernels, name, rows, alone))
    scale, off, _ = state.scales()
    compensate_errors(state, alone)
    levels = FORMS[name].levels
    assert levels is not None
    there = scale != 0
    wanted = ((state.weights + off) / np.where(there, scale, 1)).astype(np.float32)
    assert (state.level == find_nearest(wanted, levels))[there].all()


@pytest.mark.parametrize("name", sorted(FORMS))
def test_rows_of_zeros_stay_zeros(
    name: str, library: Library, kernels: Kernels, metric: Metric
) -> None:
    nothing = np.zeros((3, ROW), np.float32)
    after = refine(TYPES[name], nothing, stored(kernels, name, nothing, metric), metric)
    assert not library.to_float(TYPES[name], after, ROW).any()


@pytest.mark.parametrize("name", sorted(FORMS))
def test_columns_without_any_input_do_not_matter(
    name: str, library: Library, kernels: Kernels, rows: Rows, metric: Metric
) -> None:
    mute = metric.moments.copy()
    mute[:32], mute[:, :32] = 0, 0
    silent = Metric(mute)
    before = stored(kernels, name, rows, silent)
    after = refine(TYPES[name], rows, before, silent)
    lost = [
        silent.loss((library.to_float(TYPES[name], data, ROW) - rows).T).sum()
        for data in (before, after)
    ]
    assert np.isfinite(lost[1]) and lost[1] < lost[0]


@pytest.mark.parametrize("step", [descent.choose_levels, descent.fit_scales, descent.fit_blocks])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ2_S", "IQ3_XXS"])
def test_each_turn_alone_brings_most_rows_nearer_and_none_further(
    name: str, step: Callable[[State, Metric], None], kernels: Kernels, rows: Rows, metric: Metric
) -> None:
    state = State.of(TYPES[name], rows, stored(kernels, name, rows, metric))
    before = metric.loss(state.error())
    step(state, metric)
    after = metric.loss(state.error())
    assert (after <= before * (1 + 1e-4)).all()
    assert (after < before * (1 - 1e-3)).mean() > 0.5


@pytest.mark.parametrize("name", ["Q4_K", "Q2_K", "IQ3_S", "IQ1_S"])
def test_what_one_group_broke_is_mended_by_those_after_it(
    name: str, kernels: Kernels, rows: Rows, metric: Metric
) -> None:
    state = State.of(TYPES[name], rows, stored(kernels, name, rows, metric))
    before = metric.loss(state.error()).sum()
    compensate_errors(state, metric)
    assert metric.loss(state.error()).sum() < before / 2


def test_the_loudest_groups_come_first(metric: Metric) -> None:
    loud = np.diagonal(metric.moments)[metric.order(8)].reshape(-1, 8).sum(1)
    assert (loud[:-1] >= loud[1:]).all()
    assert sorted(metric.order(8)) == [*range(ROW)]


def test_a_row_that_did_not_gain_keeps_its_bytes(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, rows: Rows, metric: Metric
) -> None:
    def spoil(state: State, _: Metric) -> None:
        state.level[:, ::2] = 0

    for step in ("choose_levels", "fit_scales", "fit_blocks"):
        monkeypatch.setattr(descent, step, lambda state, metric: None)
    monkeypatch.setattr(descent, "compensate_errors", spoil)
    before = stored(kernels, "Q4_K", rows, metric)
    assert (refine(TYPES["Q4_K"], rows, before, metric) == before).all()
