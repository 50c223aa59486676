"""Nearest levels of single weights, and nearest codebook vectors of groups of weights. Pure.

Weights come divided by their scale, in arrays of shape (weights of a group, rows). The metric of a
group, of shape (group, group), says how the errors of its weights add up. A single weight needs
none: in every metric the nearest level is the nearest number.
"""

import numpy as np

from quant.quantize.gptq.formats import BlockFormat, Floats

ROWS_AT_ONCE = 512
"""Rows whose distances from all vectors are computed at once, so that they stay in the cache."""


def find_nearest(values: Floats, allowed: Floats) -> Floats:
    """Return for each value the nearest of the allowed numbers, which are sorted."""
    if len(allowed) > 1 and allowed[-1] - allowed[0] == len(allowed) - 1:
        # Integers without a gap: rounding is much faster than a binary search.
        return np.asarray(np.clip(np.rint(values), allowed[0], allowed[-1]), np.float32)
    # The boundaries between levels lie in the middle between them.
    return allowed[np.searchsorted((allowed[1:] + allowed[:-1]) / 2, values)]


def choose_signs(block_format: BlockFormat, values: Floats, importance: Floats) -> Floats:
    """Return the signs of weights whose signs the type stores together, as 1 and -1.

    Where only an even number of them may be negative (IQ2_XXS, IQ2_XS, IQ3_XXS), and it is odd, the
    sign that costs least is flipped: that of the weight with the smallest importance * value². ggml
    does the same, with the imatrix as importance (quantize_row_iq2_xxs_impl in ggml-quants.c).

    Args:
        block_format: The format of the type.
        values: The weights, of shape (weights that share a sign field, rows).
        importance: The weight of each squared error, of shape (weights that share a sign field,).
    """
    signs = np.where(values < 0, np.float32(-1), np.float32(1))
    if not block_format.odd_signs:
        odd = np.flatnonzero(signs.prod(0) < 0)
        cheapest = (values[:, odd] ** 2 * importance[:, None]).argmin(0)
        signs[cheapest, odd] *= -1
    return signs


class Codebook:
    """The vectors of a type, with their products precomputed for the search."""

    def __init__(self, grid: Floats) -> None:
        """Precompute the products. ``grid`` has the shape (vectors, group).

        Where the type stores signs apart, the vectors are magnitudes.
        """
        first, second = np.triu_indices(grid.shape[1])
        # M is symmetric: a pair i < j stands for M_ij and M_ji.
        twice = np.where(first == second, np.float32(1), np.float32(2))
        self.grid, self.pairs = grid, (first, second)
        self.columns = np.ascontiguousarray(grid.T)
        self.products = np.ascontiguousarray((grid[:, first] * grid[:, second] * twice).T)

    def find_nearest(self, values: Floats, metric: Floats, signs: Floats | None) -> Floats:
        """Return for each column of ``values`` the vector v that minimizes (v - x) M (v - x)ᵀ.

        Without x M xᵀ, which is the same for every v, that is v M vᵀ - 2 v M xᵀ. Both terms are
        products with precomputed matrices: Σ M_ij v_i v_j over pairs i ≤ j, and Σ v_i (M x)_i.
        Trying all vectors exactly is fast enough; ggml's lists of neighbors only hold for a
        diagonal metric.

        Args:
            values: x, of shape (group, rows).
            metric: M, of shape (group, group).
            signs: The signs of the result, of the shape of ``values``, where vectors are
                magnitudes; else None.
        """
        first, second = self.pairs
        linear = -2 * (metric @ values)
        quadratic = np.broadcast_to(metric[first, second][:, None], (len(first), values.shape[1]))
        if signs is not None:
            # The signs are moved from the vectors, which are shared by all rows, to the factors.
            linear, quadratic = linear * signs, quadratic * (signs[first] * signs[second])
        nearest = np.empty_like(values)
        for start in range(0, values.shape[1], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            score = quadratic[:, rows].T @ self.products
            score += linear[:, rows].T @ self.columns
            nearest[:, rows] = self.columns[:, score.argmin(1)]
        return nearest if signs is None else nearest * signs
