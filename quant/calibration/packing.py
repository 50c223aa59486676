"""Decide which documents are read, and in which order. Pure.

llama-imatrix cuts a text after every `context` tokens and reads each chunk by itself. Documents are
put in an order in which as few chunks as possible end inside of one. A document longer than a chunk
is split between exchanges; an exchange longer than a chunk is cut where the chunk ends.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.calibration.documents import Document
from quant.calibration.sets import CalibrationSet

WINDOW = 128
"""Documents that are considered for filling a chunk. A bound keeps domains mixed and the cost of
the subset sums small."""


@dataclass(frozen=True)
class PackedText:
    """An order of pieces."""

    order: tuple[int, ...]
    cuts: int
    """Chunk ends inside of a piece, beyond those that the length of the piece makes necessary."""


def shuffle_documents(
    calibration_set: CalibrationSet, documents: Sequence[Document]
) -> tuple[Document, ...]:
    """Return the documents in an order that only their ids and the set's seed decide."""
    return tuple(sorted(documents, key=lambda d: _hash(calibration_set, d, "order")))


def split_held_out(
    calibration_set: CalibrationSet, documents: Sequence[Document]
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Return the documents to read, and those that are held out.

    The side of a document depends on its id and the seed alone, so adding documents moves no other
    to the other side: what one release held out, the next one never trains on.
    """
    # The first 8 bytes of the hash are a uniform number below 2**64.
    limit = calibration_set.held_out * 2**64
    is_held_out = [
        int.from_bytes(_hash(calibration_set, d, "held out")[:8], "big") < limit for d in documents
    ]
    read = tuple(d for d, out in zip(documents, is_held_out, strict=True) if not out)
    return read, tuple(d for d, out in zip(documents, is_held_out, strict=True) if out)


def draw_documents(
    calibration_set: CalibrationSet, documents: Sequence[Document], tokens: Sequence[int]
) -> tuple[int, ...]:
    """Choose documents until each source has its share of the set's tokens.

    Args:
        calibration_set: The set. Without ``tokens`` all documents are chosen.
        documents: Documents in reading order.
        tokens: Tokens of each document.

    Returns:
        Indices of the chosen documents, in order.
    """
    if calibration_set.tokens is None:
        return tuple(range(len(documents)))
    remaining = {s.name: calibration_set.tokens * (s.share or 0) for s in calibration_set.source}
    chosen = []
    for n, document in enumerate(documents):
        # Documents are not cut to the exact share: a source exceeds it by less than one document.
        if remaining[document.source] > 0:
            remaining[document.source] -= tokens[n]
            chosen.append(n)
    return tuple(chosen)


def pack_chunks(sizes: Sequence[int], context: int, first_room: int | None = None) -> PackedText:
    """Order pieces so that few of them lie across the end of a chunk.

    Args:
        sizes: Tokens of each piece.
        context: Tokens of a chunk.
        first_room: Tokens that fit into the first chunk, if the model adds a token of its own at
            the beginning. None is ``context``.
    """
    queue, rests = list(range(len(sizes))), [size % context for size in sizes]
    order: list[int] = []
    room, cuts = first_room or context, 0
    is_empty = True  # the current chunk
    while queue:
        # An empty chunk begins with the next piece in order, so no piece waits for ever, and the
        # mixture of domains from the shuffle is kept.
        batch = queue[:1] if is_empty else _fill_chunk(rests, queue[:WINDOW], room)
        for n in batch:
            cuts += _count_needless_cuts(sizes[n], room, context)
            room -= sizes[n]
            is_empty = room <= 0 and room % context == 0
            # room is negative after a piece that goes on in the next chunks. Its remainder is
            # positive in Python: what the piece leaves of its last chunk.
            room = context if is_empty else room if room > 0 else room % context
        order += batch
        placed = set(batch)
        queue = [n for n in queue if n not in placed]
    return PackedText(tuple(order), cuts)


def group_exchanges(sizes: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Group consecutive exchanges of a long document as long as they fit into a chunk.

    Args:
        sizes: Tokens of each exchange.
        room: Tokens of a chunk.

    Returns:
        Indices of the exchanges of each group.
    """
    groups: list[list[int]] = []
    used = 0
    for n, size in enumerate(sizes):
        if not groups or used + size > room:
            groups.append([])
            used = 0
        groups[-1].append(n)
        used += size
    return tuple(map(tuple, groups))


def split_exchanges(text: str, marker: str) -> tuple[str, ...]:
    """Split a rendered conversation before each user turn but the first.

    Args:
        text: The rendered conversation.
        marker: What the template writes before a user turn. An empty one splits nothing.
    """
    if not marker or text.count(marker) < 2:
        return (text,)
    head, first, *others = text.split(marker)
    return (head + marker + first, *(marker + other for other in others))


def count_by_source(
    documents: Sequence[Document], tokens: Sequence[int]
) -> Mapping[str, tuple[int, int]]:
    """Return the number of documents and of tokens by source."""
    totals: dict[str, tuple[int, int]] = {}
    for document, n in zip(documents, tokens, strict=True):
        count, total = totals.get(document.source, (0, 0))
        totals[document.source] = (count + 1, total + n)
    return totals


def _hash(calibration_set: CalibrationSet, document: Document, use: str) -> bytes:
    """Return a hash that the document's id and the seed decide, another for each use."""
    key = f"{calibration_set.seed}/{use}/{document.source}/{document.id}"
    return hashlib.sha256(key.encode()).digest()


def _fill_chunk(rests: Sequence[int], window: Sequence[int], room: int) -> list[int]:
    """Choose pieces that fill a chunk to its last token; else return the next piece in order.

    This is the subset-sum problem, solved by dynamic programming: bit i of `sums[n]` says that some
    of the n largest pieces add up to i, so adding a piece is a shift and an OR of one integer.

    Args:
        rests: Tokens of each piece modulo the chunk. A piece longer than a chunk fills whole chunks
            and its rest, wherever it begins.
        window: Indices of the pieces to choose from.
        room: Tokens left in the chunk.
    """
    mask, sums = (1 << room + 1) - 1, [1]
    by_size = sorted(window, key=lambda n: -rests[n])
    for n in by_size:
        sums.append((sums[-1] | sums[-1] << rests[n]) & mask)
    if not sums[-1] >> room & 1:
        return [window[0]]
    # Walk back. A piece is taken only if the larger ones before it cannot make the sum alone, so
    # the largest are used up first: small ones are easier to place later.
    left, chosen = room, []
    for at in range(len(by_size), 0, -1):
        if not sums[at - 1] >> left & 1:
            chosen.append(by_size[at - 1])
            left -= rests[by_size[at - 1]]
    return chosen


def _count_needless_cuts(size: int, room: int, context: int) -> int:
    """Return the chunk ends inside of a piece, beyond those that its length makes necessary.

    A piece of `size` tokens that begins with `room` tokens left crosses ceil((size - room) /
    context) chunk ends. The fewest possible are ceil(size / context) - 1.
    """
    return -(-max(size - room, 0) // context) - (-(-size // context) - 1)
