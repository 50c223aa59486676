"""Unpacking and packing stored rows: ggml's bytes come back, and ggml reads what was packed."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from quant.llama import ggml
from quant.llama.ggml import Bytes, Rows
from quant.llama.types import TYPES, GGMLType
from quant.quantize.gptq.formats import (
    FORMATS,
    SHIFT,
    BlockFormat,
    Blocks,
    pack_blocks,
    unpack_blocks,
)
from quant.quantize.gptq.layouts import LAYOUTS, Field, write_fields
from tests.quant.quantize.gptq.conftest import Quantizer

ROWS, ROW = 8, 512
MANY = 100
EVERY_TYPE = pytest.mark.parametrize("name", FORMATS)


def some_rows() -> Rows:
    """Return ordinary rows, and some that are zero, half zero, with outliers, constant, or offset."""
    random = np.random.default_rng(11)
    rows = random.normal(0, 0.02, (ROWS, ROW))
    rows[1] = 0
    rows[2, : ROW // 2] = 0
    rows[3] *= np.where(random.random(ROW) < 0.02, 100, 1)
    rows[4] = 0.0371
    rows[5] += 0.1
    rows[6] *= np.repeat(random.lognormal(0, 3, ROW // 32), 32)
    return rows.astype(np.float32)


def bits(t: GGMLType, field: Field) -> Bytes:
    """Return one block in which the field's bits are 1 and all others 0."""
    block = np.zeros((1, t.block_bytes), np.uint8)
    for part in field:
        ones = np.full((1, part.words * len(part.shifts)), part.mask, np.uint64)
        write_fields((dataclasses.replace(part, lowest=0),), block, ones)
    return block


def halves(random: np.random.Generator, shape: tuple[int, ...]) -> Rows:
    return random.normal(0, 0.01, shape).astype(np.float16).astype(np.float32)


def any_bytes(t: GGMLType) -> Bytes:
    """Return MANY rows of random bits, with every code among them; d and dmin are finite."""
    random, layout = np.random.default_rng(12), LAYOUTS[t.name]
    blocks = random.integers(
        0, 256, (MANY * t.bytes(ROW) // t.block_bytes, t.block_bytes), np.uint8
    )
    if t.name == "Q8_0":  # never in what ggml writes, and refused
        blocks[blocks == 128] = 127
    for field in filter(None, (layout.d, layout.dmin)):
        blocks &= ~bits(t, field)
        write_fields(
            field, blocks, halves(random, (len(blocks), 1)).astype(np.float16).view(np.uint16)
        )
    return blocks.reshape(-1)


def any_blocks(t: GGMLType, rows: int = ROWS) -> Blocks:
    """Return random rows of what a type can store."""
    random, fmt = np.random.default_rng(13), FORMATS[t.name]
    blocks, subs = (rows, ROW // t.block), (rows, ROW // fmt.sub_block)
    scales = fmt.scales if fmt.scales is not None else np.ones(1, np.float32)
    minimums = fmt.minimums if fmt.minimums is not None else np.full(1, fmt.has_dmin, np.float32)
    shift = random.choice(
        np.array([-SHIFT, SHIFT], np.float32),
        (rows, ROW // fmt.shift_group if fmt.shift_group else 0),
    )
    return Blocks(
        type=t,
        d=halves(random, blocks),
        dmin=halves(random, blocks) if fmt.has_dmin else np.zeros(blocks, np.float32),
        scale=random.choice(scales, subs),
        minimum=random.choice(minimums, subs),
        shift=shift,
        level=any_levels(random, fmt, rows)
        + (np.repeat(shift, fmt.shift_group, axis=1) if fmt.shift_group else 0),
    )


def any_levels(random: np.random.Generator, fmt: BlockFormat, rows: int) -> Rows:
    if fmt.levels is not None:
        return random.choice(fmt.levels, (rows, ROW))
    assert fmt.grid is not None
    level = random.choice(fmt.grid, (rows, ROW // fmt.group)).reshape(rows, ROW)
    if fmt.sign_group:
        signs = random.choice(
            np.array([-1, 1], np.float32), (rows, ROW // fmt.sign_group, fmt.sign_group)
        )
        if not fmt.odd_signs:
            signs[..., -1] *= signs.prod(axis=-1)
        level = level * signs.reshape(rows, ROW)
    return level


def test_every_type_with_a_format_has_a_layout() -> None:
    assert set(FORMATS) == set(LAYOUTS)
    assert set(FORMATS) <= set(TYPES)


@EVERY_TYPE
def test_every_bit_of_a_block_belongs_to_one_field(name: str) -> None:
    t, layout = TYPES[name], LAYOUTS[name]
    parts = [part for field in dataclasses.fields(layout) for part in getattr(layout, field.name)]
    owners = np.stack([np.unpackbits(bits(t, (part,))) for part in parts]).sum(axis=0)
    assert (owners == 1).all()


@pytest.mark.tools
@pytest.mark.parametrize("weighted", [True, False], ids=["imatrix", "plain"])
@EVERY_TYPE
def test_rows_that_ggml_wrote_come_back_byte_for_byte(
    library: ggml.Library, quantize: Quantizer, name: str, weighted: bool
) -> None:
    t = TYPES[name]
    if t.needs_imatrix and not weighted:
        pytest.skip("the type needs an imatrix")
    weights = (
        np.random.default_rng(14).lognormal(0, 1, ROW).astype(np.float32) if weighted else None
    )
    data = quantize(t, some_rows(), weights)
    blocks = unpack_blocks(t, data, ROW)
    assert pack_blocks(blocks).tobytes() == data.tobytes()
    assert blocks.to_floats().tobytes() == library.to_float(t, data, ROW).tobytes()


@pytest.mark.tools
@EVERY_TYPE
def test_random_blocks_are_read_as_ggml_reads_them_and_come_back(
    library: ggml.Library, name: str
) -> None:
    t = TYPES[name]
    data = any_bytes(t)
    blocks = unpack_blocks(t, data, ROW)
    assert blocks.to_floats().tobytes() == library.to_float(t, data, ROW).tobytes()
    assert pack_blocks(blocks).tobytes() == data.tobytes()


@pytest.mark.tools
@EVERY_TYPE
def test_everything_that_a_format_allows_is_stored_and_read_by_ggml(
    library: ggml.Library, name: str
) -> None:
    t = TYPES[name]
    meant = any_blocks(t)
    data = pack_blocks(meant)
    assert data.size == ROWS * t.bytes(ROW)
    assert np.array_equal(library.to_float(t, data, ROW), meant.to_floats())
    for field in dataclasses.fields(Blocks)[1:]:
        actual, expected = (getattr(b, field.name) for b in (unpack_blocks(t, data, ROW), meant))
        assert actual.dtype == np.float32
        assert np.array_equal(actual, expected), field.name


@pytest.mark.tools
@EVERY_TYPE
def test_changing_the_scales_alone_leaves_the_levels(library: ggml.Library, name: str) -> None:
    t = TYPES[name]
    blocks, other = unpack_blocks(t, any_bytes(t), ROW), any_blocks(t, MANY)
    blocks.d, blocks.dmin, blocks.scale, blocks.minimum = (
        other.d,
        other.dmin,
        other.scale,
        other.minimum,
    )
    data = pack_blocks(blocks)
    assert np.array_equal(unpack_blocks(t, data, ROW).level, blocks.level)
    assert np.array_equal(library.to_float(t, data, ROW), blocks.to_floats())


def test_formats_are_hashable_and_distinct() -> None:
    assert len(set(FORMATS.values())) == len(FORMATS)


@EVERY_TYPE
def test_a_format_lists_all_that_a_block_can_hold(name: str) -> None:
    t, fmt = TYPES[name], FORMATS[name]
    blocks = unpack_blocks(t, any_bytes(t), ROW)
    for allowed, numbers in (
        (fmt.levels, blocks.level),
        (fmt.scales, blocks.scale),
        (fmt.minimums, blocks.minimum),
    ):
        if allowed is not None:
            assert np.array_equal(allowed, np.unique(numbers))
    assert fmt.group == (1 if fmt.grid is None else fmt.grid.shape[1])
    if fmt.grid is not None:
        assert len(np.unique(fmt.grid, axis=0)) == len(fmt.grid)


Change = Callable[[Blocks], object]
"""Changes blocks into some that cannot be stored."""


def set_to(field: str, value: float) -> Change:
    return lambda blocks: getattr(blocks, field).__setitem__((0, 0), value)


def flip_a_sign(blocks: Blocks) -> None:
    blocks.level[0, 0] *= -1


REFUSED: list[tuple[str, str, Change]] = [
    # type, expected message, change
    ("Q4_0", "stores no level 8; its lowest is -8, its highest 7", set_to("level", 8)),
    ("Q4_K", "stores no level -1;", set_to("level", -1)),
    ("Q6_K", "stores no level 0.5;", set_to("level", 0.5)),
    ("Q5_K", "stores no level nan;", set_to("level", np.nan)),
    ("Q8_0", "stores no level -128;", set_to("level", -128)),
    ("IQ4_NL", "stores no level 0;", set_to("level", 0)),
    ("IQ2_S", r"stores no \[0.0, .*: no vector of its grid", set_to("level", 0)),
    ("IQ3_S", r"stores no \[17.0, .*: no vector of its grid", set_to("level", 17)),
    ("IQ3_XXS", r"stores no \[nan, .*: no vector of its grid", set_to("level", np.nan)),
    ("IQ1_S", r"stores no \[1.0|0.75, .*: no vector of its grid", set_to("level", 0.875)),
    ("IQ1_M", "stores no shift but 0.125 and -0.125", set_to("shift", 0.25)),
    ("IQ2_XXS", "stores no odd number of negative levels among eight", flip_a_sign),
    ("IQ2_XS", "stores no odd number of negative levels among eight", flip_a_sign),
    ("IQ3_XXS", "stores no odd number of negative levels among eight", flip_a_sign),
    ("Q3_K", "stores no scale 32; its lowest is -32, its highest 31", set_to("scale", 32)),
    ("IQ3_S", "stores no scale 2;", set_to("scale", 2)),
    ("Q8_0", "stores no scale 2;", set_to("scale", 2)),
    ("Q2_K", "stores no minimum 16;", set_to("minimum", 16)),
    ("Q4_1", "stores no minimum 0;", set_to("minimum", 0)),
    ("Q6_K", "stores no dmin", set_to("dmin", 1)),
    ("Q4_0", "stores no d 0.1: no fp16", set_to("d", 0.1)),
    ("IQ1_M", "stores no d 70000.0: no fp16", set_to("d", 70000)),
    ("IQ4_XS", "stores no d nan: no fp16", set_to("d", np.nan)),
    ("Q5_1", "stores no dmin 0.1: no fp16", set_to("dmin", -0.1)),
]


@pytest.mark.parametrize(
    ("name", "message", "change"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_numbers_that_a_type_cannot_store_are_refused(
    name: str, message: str, change: Change
) -> None:
    blocks = any_blocks(TYPES[name])
    change(blocks)
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        pack_blocks(blocks)


def test_an_odd_number_of_signs_is_stored_where_each_has_its_bit() -> None:
    for name in ("IQ2_S", "IQ3_S"):
        blocks = any_blocks(TYPES[name])
        flip_a_sign(blocks)
        assert np.array_equal(
            unpack_blocks(TYPES[name], pack_blocks(blocks), ROW).level, blocks.level
        )


def test_a_level_that_ggml_does_not_write_is_refused() -> None:
    data = np.full(TYPES["Q8_0"].block_bytes, 128, np.uint8)
    with pytest.raises(ValueError, match="Q8_0: a level of -128, which ggml does not write"):
        unpack_blocks(TYPES["Q8_0"], data, 32)


def test_bytes_that_are_not_whole_rows_are_refused() -> None:
    data = np.zeros(3 * TYPES["Q4_K"].block_bytes, np.uint8)
    with pytest.raises(
        ValueError, match="Q4_K: 432 bytes are no whole number of rows of 512 weights"
    ):
        unpack_blocks(TYPES["Q4_K"], data, 512)


def test_unpacked_arrays_can_be_changed_without_changing_the_bytes() -> None:
    for name in FORMATS:
        data = any_bytes(TYPES[name])
        data.flags.writeable = False
        blocks = unpack_blocks(TYPES[name], data, ROW)
        assert all(
            getattr(blocks, field.name).flags.writeable for field in dataclasses.fields(Blocks)[1:]
        ), name
