"""Choose levels and scales of stored rows so that what comes out of the matrix is nearest to what it was. Pure.

With the second moments H of the inputs, the error of a row is e H eᵀ, e being what the row lost. First GPTQ (Frantar et al.,
2022, arXiv:2210.17323): group after group is rounded, and what that broke is taken from the weights that are still to come,
by the inverse of H; the groups whose inputs are largest come first, and ggml's scales stay. Then in turns: each group is
chosen anew with all others as they are, and each scale, minimum and superblock's d is solved for by least squares. A step
is only taken where it lowers the error, and a row that did not gain keeps ggml's bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from quant.llama.types import GGMLType
from quant.quantize.gptq.formats import (
    FORMS,
    BlockFormat,
    Blocks,
    Floats,
    pack_blocks,
    unpack_blocks,
)
from quant.quantize.gptq.layouts import Bytes
from quant.quantize.gptq.rounding import Codebook, find_nearest, signs

DAMPING = 0.05
"""Of the mean of H's diagonal, added to it: the moments of some text are not those of all text."""
ROUNDS = 3
"""Turns after the first rounding; the third still gains some hundredths."""
PANEL = 64
"""Columns whose corrections are kept back, so that most of the work is products of large matrices."""
TINY = np.float32(1e-30)


@dataclass(frozen=True)
class Metric:
    """How errors in the columns of one matrix add up: the second moments of its inputs, and what is made of them once."""

    moments: NDArray[np.float32]
    """E[x xᵀ], (row, row)."""
    factors: dict[int, Floats] = field(default_factory=dict)

    @cached_property
    def damped(self) -> Floats:
        """The moments, a little nearer to those of inputs that have nothing in common."""
        found = np.array(self.moments, np.float32)
        found[np.diag_indices(len(found))] += np.float32(
            DAMPING * np.diagonal(found).mean(dtype=np.float64) + 1e-12
        )
        return found

    @property
    def loudness(self) -> Floats:
        """How large the input of each column is."""
        return np.diagonal(self.damped)

    def order(self, together: int) -> NDArray[np.intp]:
        """The columns, the loudest first, by so many that stay together."""
        groups = np.argsort(-self.loudness.reshape(-1, together).sum(1), kind="stable")
        return (groups[:, None] * together + np.arange(together)).reshape(-1)

    def factor(self, together: int) -> Floats:
        """Upper Cholesky factor of the inverse, in that order: how an error is handed on to the columns after it."""
        if together not in self.factors:
            order = self.order(together)
            inverse = np.linalg.inv(self.damped[np.ix_(order, order)].astype(np.float64))
            self.factors[together] = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(
                np.float32
            )
        return self.factors[together]

    def loss(self, error: Floats) -> NDArray[np.float32]:
        """Of each row, e H eᵀ; ``error`` is (row, rows)."""
        return np.asarray((error * (self.damped @ error)).sum(0), np.float32)


@dataclass
class State:
    """Rows in work. Arrays are (row, rows): a column of the matrix lies in one piece."""

    block: int
    form: BlockFormat
    blocks: Blocks
    weights: Floats
    level: Floats
    codebook: Codebook | None

    @staticmethod
    def of(ggml_type: GGMLType, rows: Floats, data: Bytes) -> "State":
        """The rows, and what ggml made of them."""
        blocks, form = unpack_blocks(ggml_type, data, rows.shape[1]), FORMS[ggml_type.name]
        weights, level = np.ascontiguousarray(rows.T), np.ascontiguousarray(blocks.level.T)
        return State(ggml_type.block, form, blocks, weights, level, _codebook(ggml_type.name))

    @property
    def each(self) -> int:
        """Scales of a block."""
        return self.block // self.form.sub

    def scales(self) -> tuple[Floats, Floats, Floats]:
        """Of every weight: what its level is multiplied with, what is taken off, and the shift in its level."""
        b, form = self.blocks, self.form
        scale = np.repeat((np.repeat(b.d, self.each, 1) * b.scale).T, form.sub, 0)
        off = np.repeat((np.repeat(b.dmin, self.each, 1) * b.minimum).T, form.sub, 0)
        shift = (
            np.repeat(b.shift.T, form.shifted, 0)
            if form.shifted
            else np.zeros((len(scale), 1), np.float32)
        )
        return scale, off, shift

    def error(self) -> Floats:
        """What each weight lost."""
        scale, off, _ = self.scales()
        return scale * self.level - off - self.weights

    def rounded(self, values: Floats, shift: Floats, own: Floats, chosen: Floats | None) -> Floats:
        """The nearest levels of a group, (group, rows), in its own metric and with the chosen signs."""
        if self.codebook:
            return self.codebook.nearest(values - shift, own, chosen) + shift
        assert self.form.levels is not None
        return find_nearest(values, self.form.levels)

    def packed(self) -> Bytes:
        """As ggml stores it."""
        self.blocks.level = np.ascontiguousarray(self.level.T)
        return pack_blocks(self.blocks)


def refine(ggml_type: GGMLType, rows: Floats, data: Bytes, metric: Metric) -> Bytes:
    """The stored rows, chosen anew. ``rows`` is (rows, row), ``data`` what ggml's kernel made of them.

    No row is further from the original, as the metric has it, than it was.
    """
    state = State.of(ggml_type, rows, data)
    before = metric.loss(state.error())
    compensate_errors(state, metric)
    for _ in range(ROUNDS):
        choose_levels(state, metric)
        fit_scales(state, metric)
        fit_blocks(state, metric)
    choose_levels(state, metric)
    better = metric.loss(state.error()) < before
    found = np.where(
        better[:, None], state.packed().reshape(len(rows), -1), data.reshape(len(rows), -1)
    )
    return np.ascontiguousarray(found).reshape(-1)


def compensate_errors(state: State, metric: Metric) -> None:
    """Round group after group, the loudest first, and hand what each broke on to those that come after."""
    form, together = state.form, max(state.form.signs, state.form.group)
    order, factor = metric.order(together), metric.factor(together)
    scale, off, shift = (a[order] for a in state.scales())
    left, level, chosen = state.weights[order], np.empty_like(state.level), None
    for first, last in _panels(len(order)):
        broken = np.empty((last - first, left.shape[1]), np.float32)
        for i in range(first, last, form.group):
            here, after = slice(i, i + form.group), slice(i + form.group, last)
            back = np.linalg.inv(factor[here, here].astype(np.float64)).astype(np.float32)
            if form.signs and i % form.signs == 0:
                alike = slice(i, i + form.signs)
                weights = np.diagonal(factor)[alike] ** -2
                chosen = signs(form, (left[alike] + off[alike]) / _safe(scale[alike]), weights)
            some = None if chosen is None else chosen[i % form.signs :][: form.group]
            level[here] = state.rounded(
                (left[here] + off[here]) / _safe(scale[here]), shift[here], back @ back.T, some
            )
            handed = back.T @ (left[here] - (scale[here] * level[here] - off[here]))
            left[after] -= factor[here, after].T @ handed
            broken[i - first : i - first + form.group] = handed
        left[last:] -= factor[first:last, last:].T @ broken
    state.level[order] = level


def choose_levels(state: State, metric: Metric) -> None:
    """Choose each group anew while all others stay, once."""
    form = state.form
    scale, off, shift = state.scales()
    error = scale * state.level - off - state.weights
    for first, last in _panels(len(error)):
        slope = metric.damped[first:last] @ error
        panel = metric.damped[first:last, first:last]
        for i in range(first, last, form.group):
            here, at = slice(i, i + form.group), slice(i - first, i - first + form.group)
            own, old = panel[at, at], state.level[here]
            step = np.linalg.solve(own, slope[at]).astype(np.float32)
            wanted = (scale[here] * old - step) / _safe(scale[here])
            chosen = None
            if form.signs == form.group:
                chosen = signs(form, wanted, np.diagonal(own))
            elif form.signs:  # more are stored together than are chosen together: they stay
                chosen = np.where(old < 0, np.float32(-1), np.float32(1))
            level = state.rounded(wanted, shift[here], own, chosen)
            change = scale[here] * (level - old)
            if form.signs:  # the signs are a guess
                better = _gain(change, slope[at], own) < 0
                level, change = (
                    np.where(better, level, old),
                    np.where(better, change, np.float32(0)),
                )
            state.level[here] = level
            error[here] += change
            slope += panel[:, at] @ change


def fit_scales(state: State, metric: Metric) -> None:
    """Solve for the scale that some weights share, then for their minimum; levels stay."""
    form, blocks = state.form, state.blocks
    if form.scales is None:
        return
    error = state.error()
    for n in range(len(error) // form.sub):
        here = slice(n * form.sub, (n + 1) * form.sub)
        own, slope = metric.damped[here, here], metric.damped[here] @ error
        d, dmin = blocks.d[:, n // state.each], blocks.dmin[:, n // state.each]
        for allowed, held, unit in (
            (form.scales, blocks.scale, d * state.level[here]),
            (form.minimums, blocks.minimum, np.broadcast_to(-dmin, state.level[here].shape)),
        ):
            if allowed is None:
                continue
            curve = (unit * (own @ unit)).sum(0)
            old = held[:, n].copy()
            new = find_nearest(old - (slope * unit).sum(0) / np.maximum(curve, TINY), allowed)
            held[:, n] = np.where(curve > 0, new, old)
            change = (held[:, n] - old) * unit
            error[here] += change
            slope += own @ change


def fit_blocks(state: State, metric: Metric) -> None:
    """Solve for d, and dmin where there is one, of each block; all else stays."""
    form, blocks = state.form, state.blocks
    error = state.error()
    for n in range(len(error) // state.block):
        here, subs = (
            slice(n * state.block, (n + 1) * state.block),
            slice(n * state.each, (n + 1) * state.each),
        )
        own, slope = metric.damped[here, here], metric.damped[here] @ error
        up = np.repeat(blocks.scale[:, subs].T, form.sub, 0) * state.level[here]
        down = -np.repeat(blocks.minimum[:, subs].T, form.sub, 0)
        d, dmin = _solved(up, down if form.has_dmin else None, own, slope)
        new_d, new_dmin = _half(blocks.d[:, n] + d), _half(blocks.dmin[:, n] + dmin)
        if form.minimums is not None:
            new_dmin = np.maximum(new_dmin, 0)
        change = (new_d - blocks.d[:, n]) * up + (new_dmin - blocks.dmin[:, n]) * down
        better = _gain(change, slope, own) < 0  # not so where a number became too large for 16 bits
        blocks.d[:, n] = np.where(better, new_d, blocks.d[:, n])
        blocks.dmin[:, n] = np.where(better, new_dmin, blocks.dmin[:, n])
        error[here] += np.where(better, change, 0)


@cache
def _codebook(type_name: str) -> Codebook | None:
    grid = FORMS[type_name].grid
    return None if grid is None else Codebook(grid)


def _gain(change: Floats, slope: Floats, own: Floats) -> Floats:
    """By how much a change of some columns moves the error of each row; below nothing is better."""
    return np.asarray((change * (2 * slope + own @ change)).sum(0), np.float32)


def _solved(up: Floats, down: Floats | None, own: Floats, slope: Floats) -> tuple[Floats, Floats]:
    """By how much d and dmin have to change: least squares with two unknowns, or with one."""
    uu, u = (up * (own @ up)).sum(0), -(slope * up).sum(0)
    alone = u / np.maximum(uu, TINY)
    if down is None:
        return alone, np.zeros_like(alone)
    own_down = own @ down
    ud, dd, d = (up * own_down).sum(0), (down * own_down).sum(0), -(slope * down).sum(0)
    determinant = uu * dd - ud * ud
    sound = determinant > 1e-6 * uu * dd
    safe = np.where(sound, determinant, 1)
    return np.where(sound, (dd * u - ud * d) / safe, alone), np.where(
        sound, (uu * d - ud * u) / safe, np.float32(0)
    )


def _panels(row: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + PANEL, row)) for first in range(0, row, PANEL))


def _safe(scale: Floats) -> Floats:
    """What may be divided by: where a scale is nothing, every level is as good."""
    return np.where(scale == 0, np.float32(1), scale)


def _half(values: Floats) -> Floats:
    """As 16 bits hold it."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
