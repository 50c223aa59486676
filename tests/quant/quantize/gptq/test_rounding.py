"""Rounding to levels and codebooks, compared with trying everything."""

import itertools

import numpy as np
import pytest

from quant.quantize.gptq.formats import FORMATS
from quant.quantize.gptq.rounding import Codebook, choose_signs, find_nearest

RNG = np.random.default_rng(7)
CODEBOOKS = sorted(name for name, fmt in FORMATS.items() if fmt.grid is not None)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(CODEBOOKS)))
def test_a_weight_gets_its_nearest_level(name: str) -> None:
    levels = FORMATS[name].levels
    assert levels is not None
    values = RNG.uniform(levels[0] * 1.5 - 1, levels[-1] * 1.5 + 1, 500).astype(np.float32)
    nearest = find_nearest(values, levels)
    assert np.isin(nearest, levels).all()
    assert (abs(nearest - values) <= abs(levels - values[:, None]).min(1) + 1e-6).all()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_group_gets_the_vector_nearest_in_its_metric(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.grid is not None
    group, rows = fmt.group, 40
    half = RNG.standard_normal((group, group))
    metric = (half @ half.T + np.eye(group)).astype(np.float32)
    values = (RNG.standard_normal((group, rows)) * abs(fmt.grid).mean()).astype(np.float32)
    signs = None if not fmt.sign_group else np.sign(values).astype(np.float32)
    nearest = Codebook(fmt.grid).find_nearest(values, metric, signs)
    for row in range(rows):
        possible = fmt.grid if signs is None else fmt.grid * signs[:, row]
        lost = possible - values[:, row]
        costs = np.einsum("eg,gh,eh->e", lost, metric, lost)
        own = nearest[:, row] - values[:, row]
        assert own @ metric @ own <= costs.min() * (1 + 1e-4) + 1e-4


def test_an_odd_number_of_negative_signs_is_made_even_at_the_least_cost() -> None:
    fmt = FORMATS["IQ2_XXS"]
    values = RNG.standard_normal((8, 50)).astype(np.float32)
    weights = RNG.uniform(0.1, 3, 8).astype(np.float32)
    signs = choose_signs(fmt, values, weights)
    assert (signs.prod(0) > 0).all()
    for row in range(50):
        even = [np.array(s) for s in itertools.product((-1, 1), repeat=8) if np.prod(s) > 0]
        costs = [(weights * values[:, row] ** 2)[s != np.sign(values[:, row])].sum() for s in even]
        actual = (weights * values[:, row] ** 2)[signs[:, row] != np.sign(values[:, row])].sum()
        assert actual == pytest.approx(min(costs), rel=1e-5)


def test_signs_with_a_bit_each_are_those_of_the_weights() -> None:
    values = RNG.standard_normal((8, 50)).astype(np.float32)
    assert (choose_signs(FORMATS["IQ3_S"], values, np.ones(8, np.float32)) == np.sign(values)).all()
