"""The nearest level of a weight, or the nearest vector of a codebook for some weights together. Pure.

Weights come divided by their scale, column by column: arrays are (weights of a group, rows). The metric of a group says
how an error in one of its weights and one in another add up; for single weights every metric is the same.
"""

import numpy as np

from quant.quantize.gptq.formats import BlockFormat, Floats

SLAB = 512
"""Rows whose distances from all vectors are held at a time, so that they stay in a core's cache."""


def find_nearest(values: Floats, allowed: Floats) -> Floats:
    """Of the sorted allowed values, the nearest to each."""
    if (
        len(allowed) > 1 and allowed[-1] - allowed[0] == len(allowed) - 1
    ):  # whole numbers without a gap
        return np.asarray(np.clip(np.rint(values), allowed[0], allowed[-1]), np.float32)
    return allowed[np.searchsorted((allowed[1:] + allowed[:-1]) / 2, values)]


def signs(form: BlockFormat, values: Floats, weights: Floats) -> Floats:
    """Which sign each of the weights gets that store their signs together, ``values`` being (signs, rows).

    Where only an even number of them may be negative, the one whose other sign costs least is turned: its square times its
    weight is the smallest.
    """
    found = np.where(values < 0, np.float32(-1), np.float32(1))
    if not form.odd_signs:
        odd = np.flatnonzero(found.prod(0) < 0)
        cheapest = (values[:, odd] ** 2 * weights[:, None]).argmin(0)
        found[cheapest, odd] *= -1
    return found


class Codebook:
    """The vectors of a type, made ready for searching."""

    def __init__(self, grid: Floats) -> None:
        """``grid`` is (vectors, group): magnitudes where signs are stored apart."""
        first, second = np.triu_indices(grid.shape[1])
        twice = np.where(first == second, np.float32(1), np.float32(2))
        self.grid, self.pairs = grid, (first, second)
        self.columns = np.ascontiguousarray(grid.T)
        self.products = np.ascontiguousarray((grid[:, first] * grid[:, second] * twice).T)

    def nearest(self, values: Floats, metric: Floats, signs: Floats | None) -> Floats:
        """For each column of ``values``, (group, rows), the vector nearest in the metric, with these signs."""
        first, second = self.pairs
        reach, own = (
            -2 * (metric @ values),
            np.broadcast_to(metric[first, second][:, None], (len(first), values.shape[1])),
        )
        if signs is not None:
            reach, own = reach * signs, own * (signs[first] * signs[second])
        found = np.empty_like(values)
        for at in range(0, values.shape[1], SLAB):
            some = slice(at, at + SLAB)
            score = own[:, some].T @ self.products
            score += reach[:, some].T @ self.columns
            found[:, some] = self.columns[:, score.argmin(1)]
        return found if signs is None else found * signs
