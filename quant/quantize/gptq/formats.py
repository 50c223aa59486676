"""Unpack ggml's stored rows into scales and levels, and pack them again. Pure.

Which numbers a type can store is a table here (``FORMATS``); where their bits lie in a block is
another (layouts.py). Nothing can be stored in two ways: no bit of a block is unused, and no vector
is twice in a grid. So what ggml wrote comes back byte for byte. Two things that a block could hold
are refused: a d that is NaN, and a level of -128 in Q8_0, which ggml does not write.
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
"""What IQ1_S and IQ1_M add to levels, or take away (IQ1S_DELTA in ggml-common.h)."""


@dataclass(frozen=True, eq=False)  # arrays have no hash: a format is equal only to itself
class BlockFormat:
    """How a type stores a row: weight = d * scale * level - dmin * minimum."""

    sub_block: int
    """Weights that share a scale, and a minimum."""
    group: int = 1
    """Weights that are stored as one vector of the grid."""
    sign_group: int = 0
    """Weights whose signs are stored in one field beside the grid; 0 if levels are signed."""
    odd_signs: bool = True
    """Whether an odd number of these signs may be negative."""
    levels: Floats | None = None
    """The levels of one weight, ascending; None if the type has a grid."""
    grid: Floats | None = None
    """The vectors, of shape (vectors, group): magnitudes where signs are stored apart, else levels
    without their shift."""
    scales: Floats | None = None
    """The scales of a sub-block, ascending; None if d is the only scale."""
    minimums: Floats | None = None
    """The minimums of a sub-block, ascending; None if it is 1 (with ``has_dmin``) or 0."""
    has_dmin: bool = False
    """Whether dmin is stored; as -dmin in Q4_1 and Q5_1, where it can be negative."""
    shift_group: int = 0
    """Weights whose levels are shifted by SHIFT in the same direction; 0 if none are."""


@dataclass
class Blocks:
    """Unpacked rows of one type: weight = d * scale * level - dmin * minimum."""

    type: GGMLType
    d: Floats
    """Of shape (rows, blocks of a row); each number is exactly an fp16."""
    dmin: Floats
    """Of shape (rows, blocks of a row); 0 if the type has none."""
    scale: Floats
    """Of shape (rows, row // sub_block); 1 if d is the only scale."""
    minimum: Floats
    """Of shape (rows, row // sub_block); 1 in Q4_1 and Q5_1, 0 if the type has none."""
    shift: Floats
    """Of shape (rows, row // shift_group), SHIFT or -SHIFT; (rows, 0) if levels are not shifted."""
    level: Floats
    """Of shape (rows, row); the shift is included."""

    def to_floats(self) -> Floats:
        """Return the weights, of shape (rows, row), equal to the bit to what ggml reads."""
        # d * scale is exact: it has 19 bits of float32's 24. So is the whole product where a
        # minimum follows. In whatever order ggml multiplies, there is one rounding, in one place.
        fmt = FORMATS[self.type.name]
        sub_blocks = self.type.block // fmt.sub_block
        scales = np.repeat(self.d, sub_blocks, axis=1) * self.scale
        weights = scales[..., None] * self.level.reshape(*scales.shape, fmt.sub_block)
        if fmt.has_dmin:
            weights -= (np.repeat(self.dmin, sub_blocks, axis=1) * self.minimum)[..., None]
        return weights.reshape(self.level.shape)


def unpack_blocks(ggml_type: GGMLType, data: Bytes, row: int) -> Blocks:
    """Return stored rows unpacked.

    Args:
        ggml_type: A type of ``FORMATS``.
        data: Whole rows, one after another.
        row: Weights of a row.

    Raises:
        ValueError: ``data`` is not a whole number of rows, or has a level of -128 in Q8_0.
    """
    fmt, layout = FORMATS[ggml_type.name], LAYOUTS[ggml_type.name]
    rows, rest = divmod(data.size, ggml_type.bytes(row))
    if rest:
        raise ValueError(
            f"{ggml_type.name}: {data.size} bytes are no whole number of rows of {row} weights"
        )
    stored = data.reshape(-1, ggml_type.block_bytes)
    blocks, subs = (rows, row // ggml_type.block), (rows, row // fmt.sub_block)
    dmin = _decode_fp16(layout.dmin, stored, blocks)
    shift = _decode(
        _SHIFTS, layout.shift, stored, (rows, row // fmt.shift_group if fmt.shift_group else 0)
    )
    return Blocks(
        type=ggml_type,
        d=_decode_fp16(layout.d, stored, blocks),
        dmin=-dmin if _negated(fmt) else dmin,
        scale=_decode(_scales(fmt), layout.scale, stored, subs),
        minimum=_decode(_minimums(fmt), layout.minimum, stored, subs),
        shift=shift,
        level=_levels(ggml_type, stored, shift).reshape(rows, row),
    )


def pack_blocks(blocks: Blocks) -> Bytes:
    """Return the rows, one after another, as ggml stores them.

    Raises:
        ValueError: The type cannot store a number exactly. Nothing is rounded here.
    """
    name, fmt, layout = blocks.type.name, FORMATS[blocks.type.name], LAYOUTS[blocks.type.name]
    # Zeros, because write_fields only sets bits.
    stored = np.zeros((blocks.level.size // blocks.type.block, blocks.type.block_bytes), np.uint8)
    if not fmt.has_dmin and blocks.dmin.any():
        raise ValueError(f"{name} stores no dmin")
    if fmt.shift_group and not np.isin(blocks.shift, _SHIFTS).all():
        raise ValueError(f"{name} stores no shift but {SHIFT} and -{SHIFT}")
    write_fields(layout.d, stored, _encode_fp16(name, "d", blocks.d))
    write_fields(
        layout.dmin,
        stored,
        _encode_fp16(name, "dmin", -blocks.dmin if _negated(fmt) else blocks.dmin),
    )
    write_fields(layout.scale, stored, _encode(name, "scale", _scales(fmt), blocks.scale))
    write_fields(layout.minimum, stored, _encode(name, "minimum", _minimums(fmt), blocks.minimum))
    write_fields(layout.shift, stored, (blocks.shift < 0).astype(np.uint8))
    if fmt.levels is not None:
        write_fields(layout.level, stored, _encode(name, "level", fmt.levels, blocks.level))
    else:
        write_fields(layout.level, stored, _vectors(name, blocks))
    if fmt.sign_group:
        write_fields(layout.sign, stored, _signs(name, blocks.level))
    return stored.reshape(-1)


def _scales(fmt: BlockFormat) -> Floats:
    return fmt.scales if fmt.scales is not None else _steps(1, 1, 1)


def _minimums(fmt: BlockFormat) -> Floats:
    return fmt.minimums if fmt.minimums is not None else _steps(int(fmt.has_dmin), 1, 1)


def _negated(fmt: BlockFormat) -> bool:
    """Return whether the type adds an offset (Q4_1, Q5_1) instead of subtracting a minimum."""
    return fmt.has_dmin and fmt.minimums is None


def _levels(ggml_type: GGMLType, stored: Bytes, shift: Floats) -> Floats:
    """Return the levels, of shape (blocks, weights of a block)."""
    fmt, layout = FORMATS[ggml_type.name], LAYOUTS[ggml_type.name]
    codes = read_fields(layout.level, stored)
    if fmt.levels is not None:
        if ggml_type.name == "Q8_0" and (codes == len(fmt.levels)).any():
            raise ValueError("Q8_0: a level of -128, which ggml does not write")
        return fmt.levels[codes]
    assert fmt.grid is not None
    levels = fmt.grid[codes].reshape(len(stored), ggml_type.block)
    if fmt.sign_group:
        signs = read_fields(layout.sign, stored)
        negative = np.unpackbits(
            signs if fmt.odd_signs else _EVEN_SIGNS[signs], axis=1, bitorder="little"
        )
        levels *= 1 - 2 * negative.astype(np.float32)
    if fmt.shift_group:
        levels += np.repeat(shift.reshape(len(stored), -1), fmt.shift_group, axis=1)
    return levels


def _encode(name: str, what: str, allowed: Floats, numbers: Floats) -> Codes:
    """Return the index of each number among the allowed ones."""
    codes = np.searchsorted(allowed, numbers).clip(max=len(allowed) - 1)
    wrong = allowed[codes] != numbers
    if wrong.any():
        what = f"{what} {numbers[wrong][0]:g}"
        raise ValueError(
            f"{name} stores no {what}; its lowest is {allowed[0]:g}, its highest {allowed[-1]:g}"
        )
    # No type has more than 256 levels, scales or minimums.
    return codes.astype(np.uint8)


def _vectors(name: str, blocks: Blocks) -> Codes:
    """Return the number of the grid's vector that each group of weights is."""
    fmt = FORMATS[name]
    assert fmt.grid is not None
    levels = np.abs(blocks.level) if fmt.sign_group else blocks.level
    if fmt.shift_group:
        levels = levels - np.repeat(blocks.shift, fmt.shift_group, axis=1)
    groups = levels.reshape(-1, fmt.group)
    coordinates, numbers = _numbers(name)
    codes = numbers[_keys(coordinates, groups)]
    # A group that is no vector has the key of another one, or a key that stands for vector 0.
    wrong = (fmt.grid[codes] != groups).any(axis=1)
    if wrong.any():
        raise ValueError(f"{name} stores no {groups[wrong][0].tolist()}: no vector of its grid")
    return codes


@cache
def _numbers(name: str) -> tuple[Floats, NDArray[np.uint16]]:
    """Return the coordinates of a type's grid, ascending, and the vectors' numbers by key."""
    grid = FORMATS[name].grid
    assert grid is not None
    coordinates = np.unique(grid)
    numbers = np.zeros(len(coordinates) ** grid.shape[1], np.uint16)
    numbers[_keys(coordinates, grid)] = np.arange(len(grid))
    return coordinates, numbers


def _keys(coordinates: Floats, groups: Floats) -> NDArray[np.intp]:
    """Return one integer for each group: the indices of its coordinates as digits."""
    # At most 8^4 keys (IQ3) or 3^8 (IQ2, IQ1): few enough for a table instead of a search.
    digits = np.searchsorted(coordinates, groups).clip(max=len(coordinates) - 1)
    return digits @ len(coordinates) ** np.arange(groups.shape[1])


def _signs(name: str, level: Floats) -> Codes:
    """Return the signs of every eight weights, the first in the lowest bit."""
    signs = np.packbits(level.reshape(-1, 8) < 0, axis=1, bitorder="little")
    if FORMATS[name].odd_signs:
        return signs
    seven = signs & np.uint8(127)
    if (_EVEN_SIGNS[seven] != signs).any():
        raise ValueError(f"{name} stores no odd number of negative levels among eight")
    return seven


def _decode(allowed: Floats, field: Field, stored: Bytes, shape: tuple[int, int]) -> Floats:
    """Return the numbers that the codes stand for; the only allowed one if none is stored."""
    if not field:
        return np.full(shape, allowed[0])
    return allowed[read_fields(field, stored)].reshape(shape)


def _decode_fp16(field: Field, stored: Bytes, shape: tuple[int, int]) -> Floats:
    """Return numbers stored as fp16; zeros if none are stored."""
    if not field:
        return np.zeros(shape, np.float32)
    return read_fields(field, stored).view(np.float16).astype(np.float32).reshape(shape)


def _encode_fp16(name: str, what: str, values: Floats) -> Codes:
    with np.errstate(over="ignore"):  # infinity is refused below
        halves = values.astype(np.float16)
    wrong = halves.astype(np.float32) != values
    if wrong.any():
        raise ValueError(f"{name} stores no {what} {values[wrong][0]!s}: no fp16")
    return halves.view(np.uint16)


def _steps(first: float, step: float, count: int) -> Floats:
    """Return ``count`` numbers: first, first + step, ..."""
    return np.arange(count, dtype=np.float32) * np.float32(step) + np.float32(first)


def _grid(kind: Any) -> Floats:
    """Return a grid of gguf-py, which keeps it as text until it is initialized."""
    kind.init_grid()
    return np.array(kind.grid, np.float32).reshape(kind.grid_shape)


def _k_format(sub_block: int, levels: int, scales: int) -> BlockFormat:
    """Return a format with as many minimums as scales, all of them integers from 0 on."""
    return BlockFormat(
        sub_block,
        levels=_steps(0, 1, levels),
        scales=_steps(0, 1, scales),
        minimums=_steps(0, 1, scales),
        has_dmin=True,
    )


def _grid_format(sub_block: int, kind: Any, scales: Floats, *, odd_signs: bool) -> BlockFormat:
    """Return a format with a grid of magnitudes, and the signs of eight weights in one field."""
    grid = _grid(kind)
    return BlockFormat(
        sub_block,
        group=grid.shape[1],
        sign_group=8,
        odd_signs=odd_signs,
        grid=grid,
        scales=scales,
    )


_SHIFTS = _steps(SHIFT, -2 * SHIFT, 2)
# ksigns_iq2xs in ggml-common.h, computed: bit 7 is the parity of the other seven.
_EVEN_SIGNS = np.array([signs | (signs.bit_count() & 1) << 7 for signs in range(128)], np.uint8)
"""By the seven signs that are stored: all eight, of which an even number is negative."""
_IQ4_LEVELS = np.array(quants.IQ4_NL.kvalues, np.float32)
_IQ1_GRID = _grid(quants.IQ1_S)

FORMATS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, levels=_steps(-8, 1, 16)),
    "Q4_1": BlockFormat(32, levels=_steps(0, 1, 16), has_dmin=True),
    "Q5_0": BlockFormat(32, levels=_steps(-16, 1, 32)),
    "Q5_1": BlockFormat(32, levels=_steps(0, 1, 32), has_dmin=True),
    "Q8_0": BlockFormat(32, levels=_steps(-127, 1, 255)),
    "Q2_K": _k_format(16, levels=4, scales=16),
    # Six bits minus 32, and Q6_K's int8, as in dequantize_row_q3_K and _q6_K.
    "Q3_K": BlockFormat(16, levels=_steps(-4, 1, 8), scales=_steps(-32, 1, 64)),
    "Q4_K": _k_format(32, levels=16, scales=64),
    "Q5_K": _k_format(32, levels=32, scales=64),
    "Q6_K": BlockFormat(16, levels=_steps(-32, 1, 64), scales=_steps(-128, 1, 256)),
    "IQ4_NL": BlockFormat(32, levels=_IQ4_LEVELS),
    "IQ4_XS": BlockFormat(32, levels=_IQ4_LEVELS, scales=_steps(-32, 1, 64)),
    # Scales as in dequantize_row_* of ggml-quants.c: d * (1 + 2 * s) for IQ3_S,
    # d * (0.5 + s) * 0.5 for IQ3_XXS, d * (0.5 + s) * 0.25 for IQ2, d * (2 * s + 1) for IQ1.
    "IQ3_S": _grid_format(32, quants.IQ3_S, _steps(1, 2, 16), odd_signs=True),
    "IQ3_XXS": _grid_format(32, quants.IQ3_XXS, _steps(0.25, 0.5, 16), odd_signs=False),
    "IQ2_S": _grid_format(16, quants.IQ2_S, _steps(0.125, 0.25, 16), odd_signs=True),
    "IQ2_XS": _grid_format(16, quants.IQ2_XS, _steps(0.125, 0.25, 16), odd_signs=False),
    "IQ2_XXS": _grid_format(32, quants.IQ2_XXS, _steps(0.125, 0.25, 16), odd_signs=False),
    "IQ1_S": BlockFormat(32, group=8, grid=_IQ1_GRID, scales=_steps(1, 2, 8), shift_group=32),
    "IQ1_M": BlockFormat(16, group=8, grid=_IQ1_GRID, scales=_steps(1, 2, 8), shift_group=8),
}
"""How each type stores a row, by the name of the type."""
