"""Chunks end where documents end as far as possible; ids and the seed decide everything."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.calibration.dedupe import drop_duplicates
from quant.calibration.documents import Document
from quant.calibration.packing import (
    draw_documents,
    group_exchanges,
    pack_chunks,
    shuffle_documents,
    split_exchanges,
    split_held_out,
)
from quant.calibration.sets import CalibrationSet, CalibrationSource

SET = CalibrationSet(
    "s",
    "For tests.",
    (CalibrationSource("a", "x", "MIT", path="a"), CalibrationSource("b", "x", "MIT", path="b")),
)


def docs(count: int, source: str = "a") -> tuple[Document, ...]:
    return tuple(
        Document(f"{source}{n}", "en", False, (), text=f"text {n} of {source}", source=source)
        for n in range(count)
    )


def needless(sizes: list[int], order: tuple[int, ...], context: int) -> int:
    """Count needless cuts from the positions alone."""
    ends = list(itertools.accumulate((sizes[n] for n in order), initial=0))
    inside = sum((end - 1) // context - begin // context for begin, end in itertools.pairwise(ends))
    return inside - sum(-(-sizes[n] // context) - 1 for n in order)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(16, 128))
def test_every_piece_is_read_once_and_the_cuts_are_counted(sizes: list[int], context: int) -> None:
    packed = pack_chunks(sizes, context)
    assert sorted(packed.order) == list(range(len(sizes)))
    assert packed.cuts == needless(sizes, packed.order, context)


def test_pieces_fill_chunks_exactly_where_they_can() -> None:
    assert pack_chunks([60, 30, 50, 40, 10, 10], 100).cuts == 0
    assert (
        pack_chunks([250, 60, 50, 40], 100).cuts == 0
    )  # a long one is cut where it must be, and its rest is filled up


def test_packing_cuts_far_less_than_the_given_order() -> None:
    chance = random.Random(1)
    sizes = [chance.randint(20, 400) for _ in range(2000)]
    assert pack_chunks(sizes, 512).cuts * 4 < needless(sizes, tuple(range(2000)), 512)


def test_the_first_chunk_may_be_shorter() -> None:
    sizes = [60, 40, 39, 60]
    packed = pack_chunks(sizes, 100, 99)
    ends = list(itertools.accumulate(sizes[n] for n in packed.order))
    assert 99 in ends and packed.cuts == 0


def test_a_long_conversation_is_cut_between_exchanges() -> None:
    text = "[start]<u>a<a>b<u>c<a>d<u>e"
    assert split_exchanges(text, "<u>") == ("[start]<u>a<a>b", "<u>c<a>d", "<u>e")
    assert split_exchanges(text, "") == split_exchanges(text, "<nowhere>") == (text,)
    assert split_exchanges("<u>a", "<u>") == ("<u>a",)
    assert group_exchanges([40, 50, 30, 200, 10], 100) == ((0, 1), (2,), (3,), (4,))


def test_order_and_held_out_part_are_decided_by_names_and_seed_alone() -> None:
    documents = docs(400)
    read, held_out = split_held_out(SET, documents)
    assert 20 < len(held_out) < 60 and sorted(d.id for d in read + held_out) == sorted(
        d.id for d in documents
    )
    again, _ = split_held_out(SET, documents[::-1])
    assert set(again) == set(read)
    fewer, _ = split_held_out(SET, documents[:200])
    assert set(fewer) == {
        d for d in read if d in documents[:200]
    }  # one more document moves no other
    assert shuffle_documents(SET, documents) == shuffle_documents(SET, documents[::-1]) != documents
    assert split_held_out(replace(SET, seed=1), documents)[1] != held_out
    assert split_held_out(replace(SET, held_out=0.0), documents)[1] == ()


def test_each_source_gives_its_share_of_the_tokens() -> None:
    sources = (replace(SET.source[0], share=0.75), replace(SET.source[1], share=0.25))
    with_shares = replace(SET, tokens=4000, source=sources)
    documents = shuffle_documents(with_shares, (*docs(100), *docs(100, "b")))
    chosen = [documents[n].source for n in draw_documents(with_shares, documents, [50] * 200)]
    assert (chosen.count("a"), chosen.count("b")) == (60, 20)
    assert draw_documents(SET, documents, [50] * 200) == tuple(range(200))


TEXT = " ".join(f"word{n}" for n in range(120))


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (TEXT, 1),
        (TEXT.upper() + "!", 1),
        (TEXT.replace("word7 ", "another "), 1),
        (" ".join(reversed(TEXT.split())), 2),
        (TEXT[:300] + " ".join(f"new{n}" for n in range(120)), 2),
    ],
)
def test_near_duplicates_are_dropped(other: str, kept: int) -> None:
    pair = [
        Document(name, "en", False, (), text=text)
        for name, text in (("first", TEXT), ("second", other))
    ]
    assert [d.id for d in drop_duplicates(pair)] == ["first", "second"][:kept]


def test_different_documents_are_kept() -> None:
    assert drop_duplicates(docs(50)) == docs(50)
