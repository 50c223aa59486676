"""GPTQ over ggml's blocks, then coordinate descent over levels and scales. Pure.

The goal for each row is GPTQ's layer-wise objective: with e = stored row - original row, minimize
e H eᵀ (see :mod:`quant.quantize.gptq.hessian`). ggml minimizes its diagonal only, Σ H_ii e_i².
:func:`refine_rows` starts from ggml's stored rows:

1. :func:`compensate_errors`: one pass of GPTQ (Frantar et al., 2022, arXiv:2210.17323) over the
   levels, in act-order, with the Cholesky factor of the inverse Hessian. ggml's scales stay.
2. ``ROUNDS`` rounds of coordinate descent on the same objective. :func:`choose_levels` chooses each
   level anew while all others stay, as QuantEase does (Behdin et al., 2023, arXiv:2309.01885).
   :func:`fit_scales` and :func:`fit_block_scales` solve for the scales by least squares, which
   GPTQ leaves as they were chosen before its pass.
3. A row whose loss did not fall keeps ggml's bytes.

Where a type stores vectors of a codebook (the IQ types), a group of 4 or 8 weights is rounded at
once, in the metric of its part of the Hessian, as in GPTVQ (van Baalen et al., 2024,
arXiv:2402.15319). Where a type has no codebook the group is one weight, and step 1 is plain GPTQ.

Arrays have the shape (row, rows): a column of the matrix lies in one piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from quant.llama.types import GGMLType
from quant.quantize.gptq.formats import (
    FORMATS,
    BlockFormat,
    Blocks,
    Floats,
    pack_blocks,
    unpack_blocks,
)
from quant.quantize.gptq.hessian import Hessian
from quant.quantize.gptq.layouts import Bytes
from quant.quantize.gptq.rounding import Codebook, choose_signs, find_nearest

ROUNDS = 3
"""Rounds of coordinate descent after GPTQ's pass. The third still gains some percent."""
PANEL = 64
"""Columns whose updates are applied to later columns as one product of matrices.

GPTQ calls this lazy batch updates and takes 128 columns.
"""
# A divisor where a sub-block's levels are all 0. The quotient is then 0, or not used.
TINY = np.float32(1e-30)


@dataclass
class RowState:
    """Rows while their levels and scales are chosen. Arrays have the shape (row, rows)."""

    block: int
    """Weights of a block: what one d is stored for."""
    format: BlockFormat
    blocks: Blocks
    weights: Floats
    """The original weights."""
    level: Floats
    """The chosen levels, which stand in ``blocks`` only after :meth:`pack`."""
    codebook: Codebook | None

    @staticmethod
    def unpack(ggml_type: GGMLType, rows: Floats, data: Bytes) -> "RowState":
        """Return the state that ``data``, ggml's stored rows, stands for."""
        blocks = unpack_blocks(ggml_type, data, rows.shape[1])
        return RowState(
            block=ggml_type.block,
            format=FORMATS[ggml_type.name],
            blocks=blocks,
            weights=np.ascontiguousarray(rows.T),
            level=np.ascontiguousarray(blocks.level.T),
            codebook=_codebook(ggml_type.name),
        )

    def pack(self) -> Bytes:
        """Return the rows as ggml stores them."""
        self.blocks.level = np.ascontiguousarray(self.level.T)
        return pack_blocks(self.blocks)

    @property
    def sub_blocks(self) -> int:
        """Scales in a block."""
        return self.block // self.format.sub_block

    def scales(self) -> tuple[Floats, Floats, Floats]:
        """Return, for every weight, its scale, its offset, and the shift that is in its level.

        A weight is scale * level - offset.
        """
        b, fmt = self.blocks, self.format
        scale = np.repeat((np.repeat(b.d, self.sub_blocks, 1) * b.scale).T, fmt.sub_block, 0)
        offset = np.repeat((np.repeat(b.dmin, self.sub_blocks, 1) * b.minimum).T, fmt.sub_block, 0)
        shift = (
            np.repeat(b.shift.T, fmt.shift_group, 0)
            if fmt.shift_group
            else np.zeros((len(scale), 1), np.float32)
        )
        return scale, offset, shift

    def error(self) -> Floats:
        """Return stored weight - original weight."""
        scale, offset, _ = self.scales()
        return scale * self.level - offset - self.weights

    def round_group(
        self, values: Floats, shift: Floats, metric: Floats, signs: Floats | None
    ) -> Floats:
        """Return the nearest levels of a group of weights that are rounded together.

        Args:
            values: The weights divided by their scale, of shape (group, rows).
            shift: What the type adds to every level of the group.
            metric: How errors within the group add up, of shape (group, group).
            signs: The signs of the levels, where the type stores them apart; else None.
        """
        if self.codebook:
            return self.codebook.find_nearest(values - shift, metric, signs) + shift
        assert self.format.levels is not None
        return find_nearest(values, self.format.levels)


def refine_rows(ggml_type: GGMLType, rows: Floats, data: Bytes, hessian: Hessian) -> Bytes:
    """Return ``data`` with levels and scales chosen anew, so that e H eᵀ of each row is smaller.

    Args:
        ggml_type: The type of ``data``; one of ``FORMATS``.
        rows: The original weights, of shape (rows, row).
        data: What ggml stored for them.
        hessian: The Hessian of the matrix, of shape (row, row).

    Returns:
        Stored rows of the same size. The loss of no row is above that of ``data``.
    """
    state = RowState.unpack(ggml_type, rows, data)
    before = hessian.loss(state.error())
    compensate_errors(state, hessian)
    for _ in range(ROUNDS):
        choose_levels(state, hessian)
        fit_scales(state, hessian)
        fit_block_scales(state, hessian)
    choose_levels(state, hessian)
    # GPTQ guarantees nothing for a single row: with ggml's scales fixed, a compensated weight may
    # leave the range of its block and be clipped.
    # A loss that is NaN is not less either, so such a row keeps ggml's bytes too.
    better = hessian.loss(state.error()) < before
    refined = np.where(
        better[:, None], state.pack().reshape(len(rows), -1), data.reshape(len(rows), -1)
    )
    return np.ascontiguousarray(refined).reshape(-1)


def compensate_errors(state: RowState, hessian: Hessian) -> None:
    """Round all weights with GPTQ: group by group in act-order, errors moved to later groups.

    With U from :meth:`Hessian.inverse_cholesky` and a group F of columns, not yet rounded weights w
    and their rounded values q:

        q_F     = the levels nearest to w_F in the metric (U_FFᵀ U_FF)⁻¹
        E_F     = U_FF⁻ᵀ (w_F - q_F)
        w_rest -= U_F,restᵀ E_F

    For a group of one weight these are GPTQ's equations 2 and 3: the error is divided by U_ii and
    every later column j takes U_ij of it.
    """
    # Signs are stored for eight weights and chosen together, before the first group of the eight.
    fmt, group = state.format, max(state.format.sign_group, state.format.group)
    order, factor = hessian.act_order(group), hessian.inverse_cholesky(group)
    scale, offset, shift = (a[order] for a in state.scales())
    weights, level, signs = state.weights[order], np.empty_like(state.level), None
    for first, last in _panels(len(order)):
        errors = np.empty((last - first, weights.shape[1]), np.float32)
        for i in range(first, last, fmt.group):
            here, after = slice(i, i + fmt.group), slice(i + fmt.group, last)
            inverse = np.linalg.inv(factor[here, here].astype(np.float64)).astype(np.float32)
            if fmt.sign_group and i % fmt.sign_group == 0:
                eight = slice(i, i + fmt.sign_group)
                # At step i an error e costs e² / [H⁻¹]_ii, of the columns that are left (GPTQ,
                # equation 2). That is e² / U_ii².
                importance = np.diagonal(factor)[eight] ** -2
                values = (weights[eight] + offset[eight]) / _nonzero(scale[eight])
                signs = choose_signs(fmt, values, importance)
            group_signs = None if signs is None else signs[i % fmt.sign_group :][: fmt.group]
            level[here] = state.round_group(
                (weights[here] + offset[here]) / _nonzero(scale[here]),
                shift[here],
                inverse @ inverse.T,
                group_signs,
            )
            scaled_error = inverse.T @ (weights[here] - (scale[here] * level[here] - offset[here]))
            weights[after] -= factor[here, after].T @ scaled_error
            errors[i - first : i - first + fmt.group] = scaled_error
        # The lazy batch update: all columns after the panel, in one product.
        weights[last:] -= factor[first:last, last:].T @ errors
    state.level[order] = level


def choose_levels(state: RowState, hessian: Hessian) -> None:
    """Choose each group's levels anew while all others stay: one sweep of coordinate descent.

    With half the gradient g = H e, the best real-valued change of a group F is -H_FF⁻¹ g_F. The
    levels nearest to that point in the metric H_FF are taken, then g is updated.
    """
    fmt = state.format
    scale, offset, shift = state.scales()
    error = scale * state.level - offset - state.weights
    for first, last in _panels(len(error)):
        # The gradient of a panel is kept current within it, and computed anew for the next one.
        gradient = hessian.damped[first:last] @ error
        panel = hessian.damped[first:last, first:last]
        for i in range(first, last, fmt.group):
            here, at = slice(i, i + fmt.group), slice(i - first, i - first + fmt.group)
            metric, old = panel[at, at], state.level[here]
            step = np.linalg.solve(metric, gradient[at]).astype(np.float32)
            values = (scale[here] * old - step) / _nonzero(scale[here])
            signs = None
            if fmt.sign_group == fmt.group:
                signs = choose_signs(fmt, values, np.diagonal(metric))
            elif fmt.sign_group:  # signs span several groups: one group alone may not change them
                signs = np.where(old < 0, np.float32(-1), np.float32(1))
            level = state.round_group(values, shift[here], metric, signs)
            change = scale[here] * (level - old)
            if fmt.sign_group:
                # Signs are chosen before the vector, so the pair may be worse than the old one.
                better = _loss_change(change, gradient[at], metric) < 0
                level = np.where(better, level, old)
                change = np.where(better, change, np.float32(0))
            state.level[here] = level
            error[here] += change
            gradient += panel[:, at] @ change


def fit_scales(state: RowState, hessian: Hessian) -> None:
    """Solve for the scale of each sub-block, then for its minimum. Levels stay.

    A scale s enters the weights of its sub-block as s * u, with u = d * level. The loss is a
    parabola in s, whose minimum is s - (uᵀ g) / (uᵀ H u). The nearest number that the type can
    store is taken, which is the best one on a parabola. Likewise for the minimum, with u = -dmin.
    """
    fmt, blocks = state.format, state.blocks
    if fmt.scales is None:
        return
    error = state.error()
    for n in range(len(error) // fmt.sub_block):
        here = slice(n * fmt.sub_block, (n + 1) * fmt.sub_block)
        metric, gradient = hessian.damped[here, here], hessian.damped[here] @ error
        d, dmin = blocks.d[:, n // state.sub_blocks], blocks.dmin[:, n // state.sub_blocks]
        for allowed, numbers, unit in (
            (fmt.scales, blocks.scale, d * state.level[here]),
            (fmt.minimums, blocks.minimum, np.broadcast_to(-dmin, state.level[here].shape)),
        ):
            if allowed is None:
                continue
            curvature = (unit * (metric @ unit)).sum(0)
            # A copy, because the column is written in place below.
            old = numbers[:, n].copy()
            best = old - (gradient * unit).sum(0) / np.maximum(curvature, TINY)
            numbers[:, n] = np.where(curvature > 0, find_nearest(best, allowed), old)
            change = (numbers[:, n] - old) * unit
            error[here] += change
            gradient += metric @ change


def fit_block_scales(state: RowState, hessian: Hessian) -> None:
    """Solve for d of each block, and for dmin where the type has one. All else stays.

    Both together are a least-squares problem with two unknowns; they are rounded to fp16 after it.
    """
    fmt, blocks = state.format, state.blocks
    error = state.error()
    for n in range(len(error) // state.block):
        here = slice(n * state.block, (n + 1) * state.block)
        subs = slice(n * state.sub_blocks, (n + 1) * state.sub_blocks)
        metric, gradient = hessian.damped[here, here], hessian.damped[here] @ error
        # What one unit of d, and one of dmin, adds to each weight.
        d_unit = np.repeat(blocks.scale[:, subs].T, fmt.sub_block, 0) * state.level[here]
        dmin_unit = -np.repeat(blocks.minimum[:, subs].T, fmt.sub_block, 0)
        d, dmin = _solve_two(d_unit, dmin_unit if fmt.has_dmin else None, metric, gradient)
        new_d, new_dmin = _as_fp16(blocks.d[:, n] + d), _as_fp16(blocks.dmin[:, n] + dmin)
        if fmt.minimums is not None:
            # The minimums of K types are subtracted, and are 0 where all weights are positive
            # (make_qkx2_quants in ggml-quants.c). Q4_1 and Q5_1 take both signs.
            new_dmin = np.maximum(new_dmin, 0)
        change = (new_d - blocks.d[:, n]) * d_unit + (new_dmin - blocks.dmin[:, n]) * dmin_unit
        # Not better where fp16 overflowed: the loss of an infinite change is infinity or NaN.
        better = _loss_change(change, gradient, metric) < 0
        blocks.d[:, n] = np.where(better, new_d, blocks.d[:, n])
        blocks.dmin[:, n] = np.where(better, new_dmin, blocks.dmin[:, n])
        error[here] += np.where(better, change, 0)


@cache
def _codebook(type_name: str) -> Codebook | None:
    grid = FORMATS[type_name].grid
    return None if grid is None else Codebook(grid)


def _loss_change(change: Floats, gradient: Floats, metric: Floats) -> Floats:
    """Return (e + c) H (e + c)ᵀ - e H eᵀ of each row, for a change c of some columns."""
    return np.asarray((change * (2 * gradient + metric @ change)).sum(0), np.float32)


def _solve_two(
    d_unit: Floats, dmin_unit: Floats | None, metric: Floats, gradient: Floats
) -> tuple[Floats, Floats]:
    """Return the changes of d and dmin that minimize the loss, by the normal equations."""
    aa, a = (d_unit * (metric @ d_unit)).sum(0), -(gradient * d_unit).sum(0)
    d_alone = a / np.maximum(aa, TINY)
    if dmin_unit is None:
        return d_alone, np.zeros_like(d_alone)
    weighted = metric @ dmin_unit
    ab, bb = (d_unit * weighted).sum(0), (dmin_unit * weighted).sum(0)
    b = -(gradient * dmin_unit).sum(0)
    # [aa ab; ab bb] · [d; dmin] = [a; b], solved by Cramer's rule.
    determinant = aa * bb - ab * ab
    # Where the two are nearly collinear (all levels of a block alike), only d is solved for.
    sound = determinant > 1e-6 * aa * bb
    safe = np.where(sound, determinant, 1)
    return (
        np.where(sound, (bb * a - ab * b) / safe, d_alone),
        np.where(sound, (aa * b - ab * a) / safe, np.float32(0)),
    )


def _panels(row: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + PANEL, row)) for first in range(0, row, PANEL))


def _nonzero(scale: Floats) -> Floats:
    """Return the scale with 1 for 0: where it is 0 every level gives the same weight."""
    return np.where(scale == 0, np.float32(1), scale)


def _as_fp16(values: Floats) -> Floats:
    """Return the numbers rounded to fp16; infinity where they are too large."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
