"""Which bits of a block hold d, the scales, the levels and the signs of each type. Pure.

The table at the end is written after the structs of ggml/src/ggml-common.h. The same few functions
read and write every type by it. Every bit of a block belongs to exactly one field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Codes: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""Stored integers: each is the index of a number among those that the type allows."""


@dataclass(frozen=True)
class BitField:
    """Some bits of all codes of one kind: each word of the block holds one code at every shift.

    Words come in runs. The codes of a run are those at the first shift, word after word, then those
    at the second shift, and so on.
    """

    offset: int
    """Byte at which the first word begins."""
    words: int
    bits: int
    """Bits of each code that this field holds."""
    shifts: tuple[int, ...] = (0,)
    run: int = 1
    """Words in a run."""
    size: int = 1
    """Bytes in a word."""
    step: int = 1
    """Distance from one word to the next, in words."""
    lowest: int = 0
    """What is stored for code 0: the lowest number, in two's complement."""

    def view(self, stored: Bytes) -> Codes:
        """Return a view of the words, of shape (blocks, words)."""
        # Up to the end of the last word, not of the last step, which may lie beyond the block.
        end = self.offset + self.size * (self.step * (self.words - 1) + 1)
        words: Codes = stored[:, self.offset : end].view(f"<u{self.size}")[:, :: self.step]
        return words

    def read(self, stored: Bytes) -> Codes:
        """Return the codes, of shape (blocks, codes of a block), in the integer type of a word."""
        words = self.view(stored)
        shifted = words.reshape(len(words), -1, 1, self.run) >> self.shift_column(words)
        # Minus binds tighter than &; unsigned words wrap, as two's complement wants it.
        codes: Codes = shifted - words.dtype.type(self.lowest) & words.dtype.type(self.mask)
        return codes.reshape(len(words), -1)

    def write(self, stored: Bytes, codes: Codes) -> None:
        """Write the lowest bits of the codes into the block, whose bits must be 0."""
        words = self.view(stored)
        parts = (codes + codes.dtype.type(self.lowest) & codes.dtype.type(self.mask)).astype(
            words.dtype
        )
        shifted = parts.reshape(len(words), -1, len(self.shifts), self.run) << self.shift_column(
            words
        )
        words |= np.bitwise_or.reduce(shifted, axis=2).reshape(words.shape)

    @property
    def mask(self) -> int:
        """All bits of one code set."""
        return (1 << self.bits) - 1

    def shift_column(self, words: Codes) -> Codes:
        """Return the shifts, shaped to apply to runs of words."""
        return np.array(self.shifts, words.dtype).reshape(-1, 1)


Field: TypeAlias = tuple[BitField, ...]
"""All bits of one kind of code, the lowest first."""


def read_fields(field: Field, stored: Bytes) -> Codes:
    """Return the codes of a field, of shape (blocks, codes of a block)."""
    kind = np.dtype(np.uint8 if sum(bits.bits for bits in field) <= 8 else np.uint16)
    codes, done = field[0].read(stored).astype(kind, copy=False), field[0].bits
    for bits in field[1:]:
        codes = codes | bits.read(stored).astype(kind) << kind.type(done)
        done += bits.bits
    return codes


def write_fields(field: Field, stored: Bytes, codes: Codes) -> None:
    """Write the codes of a field into blocks whose bits are still 0.

    ``codes`` has the shape (blocks, codes of a block), or any other of the same size.
    """
    done = 0
    for bits in field:
        bits.write(stored, codes >> codes.dtype.type(done))
        done += bits.bits


def _packed(offset: int, count: int, bits: int, run: int = 1) -> BitField:
    """Return a field that fills ``count`` bytes with codes."""
    return BitField(offset, count, bits, tuple(range(0, 8, bits)), run)


def _half(offset: int) -> Field:
    """Return the field of an fp16."""
    return (BitField(offset, 1, 16, size=2),)


@dataclass(frozen=True)
class BlockLayout:
    """The fields of a block; empty for what the type does not store."""

    d: Field
    level: Field
    """The level of every weight, or the number of every group's vector."""
    scale: Field = ()
    minimum: Field = ()
    dmin: Field = ()
    sign: Field = ()
    """The signs of every eight weights: one bit each, or those of the first seven."""
    shift: Field = ()


_SIX_BITS = {
    "scale": (
        BitField(4, 2, 4, (0, 8, 16, 24), size=4, step=2),
        BitField(4, 4, 2, (4, 6), run=4),
    ),
    "minimum": (
        # One 64-bit word: low nibbles of bytes 8 to 11, then high nibbles of bytes 12 to 15.
        BitField(8, 1, 4, (0, 8, 16, 24, 36, 44, 52, 60), size=8),
        BitField(8, 4, 2, (4, 6), run=4),
    ),
}
"""Of Q4_K and Q5_K: eight scales and eight minimums of six bits in 12 bytes (get_scale_min_k4).

The first four of each have a byte; its two free bits hold the upper bits of the last four.
"""

LAYOUTS: Mapping[str, BlockLayout] = {
    "Q4_0": BlockLayout(_half(0), (_packed(2, 16, 4, run=16),)),
    "Q4_1": BlockLayout(_half(0), (_packed(4, 16, 4, run=16),), dmin=_half(2)),
    "Q5_0": BlockLayout(_half(0), (_packed(6, 16, 4, run=16), _packed(2, 4, 1))),
    "Q5_1": BlockLayout(_half(0), (_packed(8, 16, 4, run=16), _packed(4, 4, 1)), dmin=_half(2)),
    "Q8_0": BlockLayout(_half(0), (BitField(2, 32, 8, lowest=-127 & 255),)),
    "Q2_K": BlockLayout(
        _half(80),
        (_packed(16, 64, 2, run=32),),
        (BitField(0, 16, 4),),
        (BitField(0, 16, 4, (4,)),),
        dmin=_half(82),
    ),
    "Q3_K": BlockLayout(
        _half(108),
        # hmask holds the third bit. Where it is clear, ggml subtracts 4.
        (_packed(32, 64, 2, run=32), _packed(0, 32, 1, run=32)),
        (_packed(96, 8, 4, run=8), _packed(104, 4, 2, run=4)),
    ),
    "Q4_K": BlockLayout(_half(0), (_packed(16, 128, 4, run=32),), **_SIX_BITS, dmin=_half(2)),
    "Q5_K": BlockLayout(
        _half(0),
        (_packed(48, 128, 4, run=32), _packed(16, 32, 1, run=32)),
        **_SIX_BITS,
        dmin=_half(2),
    ),
    "Q6_K": BlockLayout(
        _half(208),
        (_packed(0, 128, 4, run=64), _packed(128, 64, 2, run=32)),
        (BitField(192, 16, 8, lowest=-128 & 255),),
    ),
    "IQ4_NL": BlockLayout(_half(0), (_packed(2, 16, 4, run=16),)),
    "IQ4_XS": BlockLayout(
        _half(0), (_packed(8, 128, 4, run=16),), (_packed(4, 4, 4), _packed(2, 2, 2))
    ),
    "IQ3_S": BlockLayout(
        _half(0),
        (_packed(2, 64, 8), _packed(66, 8, 1)),
        (_packed(106, 4, 4),),
        sign=(_packed(74, 32, 8),),
    ),
    "IQ3_XXS": BlockLayout(
        _half(0),
        (_packed(2, 64, 8),),
        (BitField(66, 8, 4, (28,), size=4),),
        sign=(BitField(66, 8, 7, (0, 7, 14, 21), size=4),),
    ),
    "IQ2_S": BlockLayout(
        _half(0),
        (_packed(2, 32, 8), _packed(66, 8, 2)),
        (_packed(74, 8, 4),),
        sign=(_packed(34, 32, 8),),
    ),
    "IQ2_XS": BlockLayout(
        _half(0),
        (BitField(2, 32, 9, size=2),),
        (_packed(66, 8, 4),),
        sign=(BitField(2, 32, 7, (9,), size=2),),
    ),
    # Two 32-bit words for 32 weights: four numbers of vectors; then four times seven signs, and the
    # scale in the top four bits.
    "IQ2_XXS": BlockLayout(
        _half(0),
        (BitField(2, 8, 8, (0, 8, 16, 24), size=4, step=2),),
        (BitField(6, 8, 4, (28,), size=4, step=2),),
        sign=(BitField(6, 8, 7, (0, 7, 14, 21), size=4, step=2),),
    ),
    "IQ1_S": BlockLayout(
        _half(0),
        (_packed(2, 32, 8), BitField(34, 8, 3, (0, 3, 6, 9), size=2)),
        (BitField(34, 8, 3, (12,), size=2),),
        shift=(BitField(34, 8, 1, (15,), size=2),),
    ),
    "IQ1_M": BlockLayout(
        # d is scattered over the top nibbles of the four words of scales (iq1m_scale_t).
        tuple(BitField(49 + 2 * word, 1, 4, (4,)) for word in range(4)),
        (_packed(0, 32, 8), BitField(32, 16, 3, (0, 4))),
        (BitField(48, 4, 3, (0, 3, 6, 9), size=2),),
        shift=(BitField(32, 16, 1, (3, 7)),),
    ),
}
"""The fields of each type's block, by the name of the type."""
