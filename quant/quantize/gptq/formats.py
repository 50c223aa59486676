"""ggml's stored rows apart, into scales and levels, and together again.

What the numbers of a type can be is a table (``FORMS``); where their bits are in a block is another (layouts.py). Nothing is
stored in two ways: no bit of a block is unused, and no vector is in a grid twice. So what ggml wrote comes back byte for
byte. Two things that can stand in a block are refused: a d that is no number, and a level of -128 in Q8_0, which ggml does
not write.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from gguf import quants
from numpy.typing import NDArray

from quant.llama.types import GGMLType
from quant.quantize.gptq.layouts import LAYOUTS, Bytes, Codes, Field, read_fields, write_fields

Floats: TypeAlias = NDArray[np.float32]

SHIFT = 0.125
"""By how much IQ1_S and IQ1_M move levels, up or down."""


@dataclass(frozen=True, eq=False)  # arrays are not hashed: a form is equal to itself
class BlockFormat:
    """How a type stores a row: value = d * scale * level - dmin * minimum."""

    sub: int
    """Weights that share one scale, and one minimum."""
    group: int = 1
    """Weights that are chosen together, as one vector of the grid."""
    signs: int = 0
    """Weights whose signs are stored together, beside the grid; 0 where levels have their own."""
    odd_signs: bool = True
    """Whether an odd number of them may be negative."""
    levels: Floats | None = None
    """What one weight can be, ascending; None where a grid says it."""
    grid: Floats | None = None
    """(vectors, group): magnitudes where signs are stored beside it, otherwise levels without their shift."""
    scales: Floats | None = None
    """What the scale of a sub-block can be, ascending; None where d is the only scale."""
    minimums: Floats | None = None
    """What its minimum can be, ascending; None where it is 1 (with ``has_dmin``) or 0 everywhere."""
    has_dmin: bool = False
    """Whether dmin is stored. As -dmin in Q4_1 and Q5_1, where it can be negative."""
    shifted: int = 0
    """Weights that are moved by SHIFT, up or down, together; 0 where none are."""


@dataclass
class Blocks:
    """Rows of one type, apart: value = d * scale * level - dmin * minimum."""

    type: GGMLType
    d: Floats
    """(rows, blocks of a row); every one is exactly an fp16."""
    dmin: Floats
    """(rows, blocks of a row); zeros where the type has none."""
    scale: Floats
    """(rows, row // sub); ones where there is none beside d."""
    minimum: Floats
    """(rows, row // sub); ones in Q4_1 and Q5_1, zeros where there is none."""
    shift: Floats
    """(rows, row // shifted), SHIFT or -SHIFT; (rows, 0) where levels are not moved."""
    level: Floats
    """(rows, row), with the shift in it."""

    def floats(self) -> Floats:
        """The values, (rows, row), to the bit as ggml reads them."""
        # d * scale is exact, in 19 bits of 24, as is the whole product where a minimum follows: however ggml orders its
        # factors, it rounds once, in the same place
        form = FORMS[self.type.name]
        subs = self.type.block // form.sub
        each = np.repeat(self.d, subs, axis=1) * self.scale
        values = each[..., None] * self.level.reshape(*each.shape, form.sub)
        if form.has_dmin:
            values -= (np.repeat(self.dmin, subs, axis=1) * self.minimum)[..., None]
        return values.reshape(self.level.shape)


def unpack_blocks(ggml_type: GGMLType, data: Bytes, row: int) -> Blocks:
    """Stored rows of that length, apart. Raises ValueError where the bytes are no such rows."""
    form, layout = FORMS[ggml_type.name], LAYOUTS[ggml_type.name]
    rows, rest = divmod(data.size, ggml_type.bytes(row))
    if rest:
        raise ValueError(
            f"{ggml_type.name}: {data.size} bytes are no whole number of rows of {row} weights"
        )
    stored = data.reshape(-1, ggml_type.block_bytes)
    blocks, subs = (rows, row // ggml_type.block), (rows, row // form.sub)
    dmin = _floats(layout.dmin, stored, blocks)
    shift = _among(
        _SHIFTS, layout.shift, stored, (rows, row // form.shifted if form.shifted else 0)
    )
    return Blocks(
        type=ggml_type,
        d=_floats(layout.d, stored, blocks),
        dmin=-dmin if _negated(form) else dmin,
        scale=_among(_scales(form), layout.scale, stored, subs),
        minimum=_among(_minimums(form), layout.minimum, stored, subs),
        shift=shift,
        level=_levels(ggml_type, stored, shift).reshape(rows, row),
    )


def pack_blocks(blocks: Blocks) -> Bytes:
    """The bytes of the rows one after another, as ggml stores them.

    Raises ValueError that names the type and what it cannot store: nothing is rounded.
    """
    name, form, layout = blocks.type.name, FORMS[blocks.type.name], LAYOUTS[blocks.type.name]
    stored = np.zeros((blocks.level.size // blocks.type.block, blocks.type.block_bytes), np.uint8)
    if not form.has_dmin and blocks.dmin.any():
        raise ValueError(f"{name} stores no dmin")
    if form.shifted and not np.isin(blocks.shift, _SHIFTS).all():
        raise ValueError(f"{name} stores no shift but {SHIFT} and -{SHIFT}")
    write_fields(layout.d, stored, _halves(name, "d", blocks.d))
    write_fields(
        layout.dmin, stored, _halves(name, "dmin", -blocks.dmin if _negated(form) else blocks.dmin)
    )
    write_fields(layout.scale, stored, _places(name, "scale", _scales(form), blocks.scale))
    write_fields(layout.minimum, stored, _places(name, "minimum", _minimums(form), blocks.minimum))
    write_fields(layout.shift, stored, (blocks.shift < 0).astype(np.uint8))
    if form.levels is not None:
        write_fields(layout.level, stored, _places(name, "level", form.levels, blocks.level))
    else:
        write_fields(layout.level, stored, _vectors(name, blocks))
    if form.signs:
        write_fields(layout.sign, stored, _signs(name, blocks.level))
    return stored.reshape(-1)


def _scales(form: BlockFormat) -> Floats:
    return form.scales if form.scales is not None else _even(1, 1, 1)


def _minimums(form: BlockFormat) -> Floats:
    return form.minimums if form.minimums is not None else _even(int(form.has_dmin), 1, 1)


def _negated(form: BlockFormat) -> bool:
    """Whether the type has an offset that is added, and no minimum that is taken away."""
    return form.has_dmin and form.minimums is None


def _levels(ggml_type: GGMLType, stored: Bytes, shift: Floats) -> Floats:
    """(blocks, weights of a block)."""
    form, layout = FORMS[ggml_type.name], LAYOUTS[ggml_type.name]
    codes = read_fields(layout.level, stored)
    if form.levels is not None:
        if ggml_type.name == "Q8_0" and (codes == len(form.levels)).any():
            raise ValueError("Q8_0: a level of -128, which ggml does not write")
        return form.levels[codes]
    assert form.grid is not None
    levels = form.grid[codes].reshape(len(stored), ggml_type.block)
    if form.signs:
        signs = read_fields(layout.sign, stored)
        negative = np.unpackbits(
            signs if form.odd_signs else _EVEN[signs], axis=1, bitorder="little"
        )
        levels *= 1 - 2 * negative.astype(np.float32)
    if form.shifted:
        levels += np.repeat(shift.reshape(len(stored), -1), form.shifted, axis=1)
    return levels


def _places(name: str, what: str, values: Floats, wanted: Floats) -> Codes:
    """Where each number is among the values."""
    found = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    wrong = values[found] != wanted
    if wrong.any():
        what = f"{what} {wanted[wrong][0]:g}"
        raise ValueError(
            f"{name} stores no {what}; its lowest is {values[0]:g}, its highest {values[-1]:g}"
        )
    return found.astype(np.uint8)


def _vectors(name: str, blocks: Blocks) -> Codes:
    """Which vector of the grid each group of weights is."""
    form = FORMS[name]
    assert form.grid is not None
    levels = np.abs(blocks.level) if form.signs else blocks.level
    if form.shifted:
        levels = levels - np.repeat(blocks.shift, form.shifted, axis=1)
    groups = levels.reshape(-1, form.group)
    coordinates, numbers = _numbers(name)
    found = numbers[_keys(coordinates, groups)]
    # a group that is no vector has the key of another, or a key of none, for which the first one stands
    wrong = (form.grid[found] != groups).any(axis=1)
    if wrong.any():
        raise ValueError(f"{name} stores no {groups[wrong][0].tolist()}: no vector of its grid")
    return found


@cache
def _numbers(name: str) -> tuple[Floats, NDArray[np.uint16]]:
    """The coordinates of a type's grid, ascending, and by key the number of its vectors."""
    grid = FORMS[name].grid
    assert grid is not None
    coordinates = np.unique(grid)
    numbers = np.zeros(len(coordinates) ** grid.shape[1], np.uint16)
    numbers[_keys(coordinates, grid)] = np.arange(len(grid))
    return coordinates, numbers


def _keys(coordinates: Floats, groups: Floats) -> NDArray[np.intp]:
    """One number for each group: those of its coordinates, as digits."""
    digits = np.searchsorted(coordinates, groups).clip(max=len(coordinates) - 1)
    return digits @ len(coordinates) ** np.arange(groups.shape[1])


def _signs(name: str, level: Floats) -> Codes:
    """The signs of every eight weights, the first in the lowest bit."""
    signs = np.packbits(level.reshape(-1, 8) < 0, axis=1, bitorder="little")
    if FORMS[name].odd_signs:
        return signs
    seven = signs & np.uint8(127)
    if (_EVEN[seven] != signs).any():
        raise ValueError(f"{name} stores no odd number of negative levels among eight")
    return seven


def _among(values: Floats, field: Field, stored: Bytes, shape: tuple[int, int]) -> Floats:
    """The values that the codes stand for; the only one there is where nothing is stored."""
    return values[read_fields(field, stored)].reshape(shape) if field else np.full(shape, values[0])


def _floats(field: Field, stored: Bytes, shape: tuple[int, int]) -> Floats:
    """Numbers stored as fp16; zeros where nothing is."""
    if not field:
        return np.zeros(shape, np.float32)
    return read_fields(field, stored).view(np.float16).astype(np.float32).reshape(shape)


def _halves(name: str, what: str, values: Floats) -> Codes:
    with np.errstate(over="ignore"):  # an fp16 of infinity is not what came, which is told below
        halves = values.astype(np.float16)
    wrong = halves.astype(np.float32) != values
    if wrong.any():
        raise ValueError(f"{name} stores no {what} {values[wrong][0]!s}: no fp16")
    return halves.view(np.uint16)


def _even(first: float, step: float, count: int) -> Floats:
    """So many numbers at even distances."""
    return np.arange(count, dtype=np.float32) * np.float32(step) + np.float32(first)


def _grid(kind: Any) -> Floats:
    """A grid as gguf-py has it, which keeps it as text until it is asked."""
    kind.init_grid()
    return np.array(kind.grid, np.float32).reshape(kind.grid_shape)


_SHIFTS = _even(SHIFT, -2 * SHIFT, 2)
_EVEN = np.array([signs | (signs.bit_count() & 1) << 7 for signs in range(128)], np.uint8)
"""Seven signs and the eighth, which makes the number of negative ones even."""
_TABLE = np.array(quants.IQ4_NL.kvalues, np.float32)
_TERNARY = _grid(quants.IQ1_S)

FORMS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, levels=_even(-8, 1, 16)),
    "Q4_1": BlockFormat(32, levels=_even(0, 1, 16), has_dmin=True),
    "Q5_0": BlockFormat(32, levels=_even(-16, 1, 32)),
    "Q5_1": BlockFormat(32, levels=_even(0, 1, 32), has_dmin=True),
    "Q8_0": BlockFormat(32, levels=_even(-127, 1, 255)),
    "Q2_K": BlockFormat(
        16, levels=_even(0, 1, 4), scales=_even(0, 1, 16), minimums=_even(0, 1, 16), has_dmin=True
    ),
    "Q3_K": BlockFormat(16, levels=_even(-4, 1, 8), scales=_even(-32, 1, 64)),
    "Q4_K": BlockFormat(
        32, levels=_even(0, 1, 16), scales=_even(0, 1, 64), minimums=_even(0, 1, 64), has_dmin=True
    ),
    "Q5_K": BlockFormat(
        32, levels=_even(0, 1, 32), scales=_even(0, 1, 64), minimums=_even(0, 1, 64), has_dmin=True
    ),
    "Q6_K": BlockFormat(16, levels=_even(-32, 1, 64), scales=_even(-128, 1, 256)),
    "IQ4_NL": BlockFormat(32, levels=_TABLE),
    "IQ4_XS": BlockFormat(32, levels=_TABLE, scales=_even(-32, 1, 64)),
    "IQ3_S": BlockFormat(32, 4, 8, grid=_grid(quants.IQ3_S), scales=_even(1, 2, 16)),
    "IQ3_XXS": BlockFormat(
        32, 4, 8, odd_signs=False, grid=_grid(quants.IQ3_XXS), scales=_even(0.25, 0.5, 16)
    ),
    "IQ2_S": BlockFormat(16, 8, 8, grid=_grid(quants.IQ2_S), scales=_even(0.125, 0.25, 16)),
    "IQ2_XS": BlockFormat(
        16, 8, 8, odd_signs=False, grid=_grid(quants.IQ2_XS), scales=_even(0.125, 0.25, 16)
    ),
    "IQ2_XXS": BlockFormat(
        32, 8, 8, odd_signs=False, grid=_grid(quants.IQ2_XXS), scales=_even(0.125, 0.25, 16)
    ),
    "IQ1_S": BlockFormat(32, 8, grid=_TERNARY, scales=_even(1, 2, 8), shifted=32),
    "IQ1_M": BlockFormat(16, 8, grid=_TERNARY, scales=_even(1, 2, 8), shifted=8),
}
"""How each type stores a row, by its name."""
