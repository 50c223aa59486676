"""The Hessian of one matrix, and what GPTQ derives from it. Pure."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quant.quantize.gptq.formats import Floats

DAMPING = 0.05
"""Fraction of the diagonal's mean that is added to the diagonal.

GPTQ's reference code uses 0.01. The Hessian of one calibration text is not that of all text, and
with few tokens for an expert it is not of full rank: more damping keeps compensation modest.
"""


@dataclass(frozen=True)
class Hessian:
    """How errors in the columns of a matrix add up to an error of its output.

    The output of a row w for an input x is w·x. If the row is off by e, the expected squared error
    of its output is E[(e·x)²] = e H eᵀ with H = E[x xᵀ]. That is half the Hessian of the squared
    error (GPTQ, section 3); the factor changes no minimum.
    """

    matrix: NDArray[np.float32]
    """E[x xᵀ], of shape (row, row)."""
    factors: dict[int, Floats] = field(default_factory=dict)
    """Cholesky factors by group size, computed once each."""

    @cached_property
    def damped(self) -> Floats:
        """H + λI, with λ = DAMPING times the mean of H's diagonal."""
        damped = np.array(self.matrix, np.float32)
        # 1e-12: a Hessian of zeros, from inputs that were all 0, must have an inverse too.
        damped[np.diag_indices(len(damped))] += np.float32(
            DAMPING * np.diagonal(damped).mean(dtype=np.float64) + 1e-12
        )
        return damped

    @property
    def diagonal(self) -> Floats:
        """The diagonal of the damped Hessian: the mean square of each column's input."""
        return np.diagonal(self.damped)

    def act_order(self, group: int) -> NDArray[np.intp]:
        """Return the columns by falling diagonal, in groups of ``group`` that stay together.

        This is GPTQ's act-order (``desc_act``): columns with large inputs are rounded first, while
        many columns are left to compensate for them. Weights stay together that are rounded as one
        vector of a codebook, or whose signs are chosen together.
        """
        # Stable: which of two equal columns comes first must not depend on numpy's sort.
        groups = np.argsort(-self.diagonal.reshape(-1, group).sum(1), kind="stable")
        return (groups[:, None] * group + np.arange(group)).reshape(-1)

    def inverse_cholesky(self, group: int) -> Floats:
        """Return the upper triangular U with UᵀU = H⁻¹, its columns in act-order.

        Row i of U holds what GPTQ needs at step i (section 3.3, step 3 of the paper): the inverse
        Hessian of the columns that are not rounded yet has U_ii² as its first diagonal element, and
        U_ij / U_ii is how much of column i's error column j takes over. One factorization replaces
        the update of the inverse after every column.
        """
        # Not locked: two threads may compute it at once, and get the same numbers.
        if group not in self.factors:
            order = self.act_order(group)
            # In 64 bits, and symmetric to the last bit: rounding must not make the inverse
            # indefinite, on which the Cholesky factorization fails.
            inverse = np.linalg.inv(self.damped[np.ix_(order, order)].astype(np.float64))
            self.factors[group] = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
        return self.factors[group]

    def loss(self, error: Floats) -> NDArray[np.float32]:
        """Return e H eᵀ of each row. ``error`` has the shape (row, rows)."""
        return np.asarray((error * (self.damped @ error)).sum(0), np.float32)
