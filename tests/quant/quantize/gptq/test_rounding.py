"""Rounding to levels and codebooks, held against trying everything."""

import itertools

import numpy as np
import pytest

from quant.quantize.gptq.formats import FORMS
from quant.quantize.gptq.rounding import Codebook, find_nearest, signs

RNG = np.random.default_rng(7)
CODEBOOKS = sorted(name for name, form in FORMS.items() if form.grid is not None)


@pytest.mark.parametrize("name", sorted(set(FORMS) - set(CODEBOOKS)))
def test_a_weight_gets_the_level_that_no_other_is_nearer_than(name: str) -> None:
    levels = FORMS[name].levels
    assert levels is not None
    values = RNG.uniform(levels[0] * 1.5 - 1, levels[-1] * 1.5 + 1, 500).astype(np.float32)
    found = find_nearest(values, levels)
    assert np.isin(found, levels).all()
    assert (abs(found - values) <= abs(levels - values[:, None]).min(1) + 1e-6).all()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_group_gets_the_vector_that_is_nearest_in_its_metric(name: str) -> None:
    form = FORMS[name]
    assert form.grid is not None
    group, rows = form.group, 40
    half = RNG.standard_normal((group, group))
    metric = (half @ half.T + np.eye(group)).astype(np.float32)
    values = (RNG.standard_normal((group, rows)) * abs(form.grid).mean()).astype(np.float32)
    chosen = None if not form.signs else np.sign(values).astype(np.float32)
    found = Codebook(form.grid).nearest(values, metric, chosen)
    for row in range(rows):
        possible = form.grid if chosen is None else form.grid * chosen[:, row]
        lost = possible - values[:, row]
        costs = np.einsum("eg,gh,eh->e", lost, metric, lost)
        own = found[:, row] - values[:, row]
        assert own @ metric @ own <= costs.min() * (1 + 1e-4) + 1e-4


def test_only_an_even_number_of_signs_is_turned_and_the_cheapest_one_pays() -> None:
    form = FORMS["IQ2_XXS"]
    values = RNG.standard_normal((8, 50)).astype(np.float32)
    weights = RNG.uniform(0.1, 3, 8).astype(np.float32)
    found = signs(form, values, weights)
    assert (found.prod(0) > 0).all()
    for row in range(50):
        even = [np.array(s) for s in itertools.product((-1, 1), repeat=8) if np.prod(s) > 0]
        costs = [(weights * values[:, row] ** 2)[s != np.sign(values[:, row])].sum() for s in even]
        mine = (weights * values[:, row] ** 2)[found[:, row] != np.sign(values[:, row])].sum()
        assert mine == pytest.approx(min(costs), rel=1e-5)


def test_signs_that_are_free_are_those_of_the_weights() -> None:
    values = RNG.standard_normal((8, 50)).astype(np.float32)
    assert (signs(FORMS["IQ3_S"], values, np.ones(8, np.float32)) == np.sign(values)).all()
