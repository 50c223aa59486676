"""The Hessian of a matrix: its damping, its order of columns and its Cholesky factor."""

import numpy as np

from quant.quantize.gptq.hessian import DAMPING, Hessian

ROW = 64


def make_hessian(seed: int = 3) -> Hessian:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((500, 20)) @ rng.standard_normal((20, ROW))
    inputs *= np.exp(rng.normal(0, 0.7, ROW))
    return Hessian(np.asarray(inputs.T @ inputs / 500, np.float32))


def test_damping_is_a_fraction_of_the_mean_of_the_diagonal() -> None:
    hessian = make_hessian()
    added = hessian.damped - hessian.matrix
    expected = DAMPING * np.diagonal(hessian.matrix).mean()
    assert np.allclose(added, np.eye(ROW) * expected, rtol=1e-3, atol=1e-6)


def test_act_order_puts_the_groups_with_the_largest_diagonal_first() -> None:
    hessian = make_hessian()
    order = hessian.act_order(8)
    sums = np.diagonal(hessian.matrix)[order].reshape(-1, 8).sum(1)
    assert (sums[:-1] >= sums[1:]).all()
    assert sorted(order) == [*range(ROW)]
    assert (np.diff(order.reshape(-1, 8), axis=1) == 1).all()  # groups stay together


def test_the_factor_is_upper_triangular_and_its_square_is_the_inverse() -> None:
    hessian = make_hessian()
    for group in (1, 8):
        factor, order = hessian.inverse_cholesky(group), hessian.act_order(group)
        assert (np.tril(factor, -1) == 0).all()
        product = (factor.T @ factor) @ hessian.damped[np.ix_(order, order)]
        assert np.allclose(product, np.eye(ROW), atol=1e-2)


def test_the_loss_is_the_squared_error_of_the_output() -> None:
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((1000, ROW)).astype(np.float32)
    hessian = Hessian(inputs.T @ inputs / np.float32(1000))
    error = rng.standard_normal((ROW, 3)).astype(np.float32)
    damping = DAMPING * np.diagonal(hessian.matrix).mean() * (error**2).sum(0)
    expected = ((inputs @ error) ** 2).mean(0) + damping
    assert np.allclose(hessian.loss(error), expected, rtol=1e-3)
