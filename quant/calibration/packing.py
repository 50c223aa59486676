"""Which documents are read, in which order, so that a chunk of context seldom ends inside of one. Pure.

llama-imatrix cuts a text after every so many tokens and reads each chunk by itself. Documents are put in such an order that
chunks end where documents end; one that is longer than a chunk is cut between turns, and a turn that is longer still is
cut where the chunk ends.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.calibration.documents import Document
from quant.calibration.sets import CalibrationSet

WINDOW = 128
"""Documents that are looked at for filling a chunk: themes stay mixed, and nothing waits for long."""


@dataclass(frozen=True)
class PackedText:
    """An order of pieces."""

    order: tuple[int, ...]
    cuts: int
    """Ends of chunks that lie inside of a piece and would not have to: for more than its length makes necessary."""


def order_of(told: CalibrationSet, documents: Sequence[Document]) -> tuple[Document, ...]:
    """The documents in an order that only their names and the seed decide: themes are mixed, always in the same way."""
    return tuple(sorted(documents, key=lambda d: _mark(told, d, "order")))


def split_held_out(
    told: CalibrationSet, documents: Sequence[Document]
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """The documents to read, and those that are held out; a document's side does not depend on the others."""
    most = told.held_out * 2**64
    held = [int.from_bytes(_mark(told, d, "held out")[:8], "big") < most for d in documents]
    read = tuple(d for d, out in zip(documents, held, strict=True) if not out)
    return read, tuple(d for d, out in zip(documents, held, strict=True) if out)


def draw_documents(
    told: CalibrationSet, documents: Sequence[Document], tokens: Sequence[int]
) -> tuple[int, ...]:
    """Which documents are read, by index and in order: of each source as many as its share of the set's tokens takes."""
    if told.tokens is None:
        return tuple(range(len(documents)))
    room = {s.name: told.tokens * (s.share or 0) for s in told.source}
    chosen = []
    for n, document in enumerate(documents):
        if room[document.source] > 0:
            room[document.source] -= tokens[n]
            chosen.append(n)
    return tuple(chosen)


def pack_chunks(sizes: Sequence[int], context: int, first_room: int | None = None) -> PackedText:
    """An order of pieces of so many tokens in which as few as possible lie across the end of a chunk.

    ``first_room``: what the first chunk can take, where the model wants a token of its own at the beginning.
    """
    queue, rests = list(range(len(sizes))), [size % context for size in sizes]
    order: list[int] = []
    room, cuts = first_room or context, 0
    fresh = True
    while queue:
        taken = queue[:1] if fresh else _next(rests, queue[:WINDOW], room)
        for n in taken:
            cuts += _needless(sizes[n], room, context)
            room -= sizes[n]
            fresh = room <= 0 and room % context == 0
            room = context if fresh else room if room > 0 else room % context
        order += taken
        gone = set(taken)
        queue = [n for n in queue if n not in gone]
    return PackedText(tuple(order), cuts)


def group_documents(sizes: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Exchanges of a long document put together as long as they fit into a chunk."""
    found: list[list[int]] = []
    used = 0
    for n, size in enumerate(sizes):
        if not found or used + size > room:
            found.append([])
            used = 0
        found[-1].append(n)
        used += size
    return tuple(map(tuple, found))


def list_exchanges(text: str, marker: str) -> tuple[str, ...]:
    """A rendered conversation, cut before every turn of the user but the first; what stands before that belongs to it."""
    if not marker or text.count(marker) < 2:
        return (text,)
    head, first, *others = text.split(marker)
    return (head + marker + first, *(marker + other for other in others))


def count_tokens(
    documents: Sequence[Document], tokens: Sequence[int]
) -> Mapping[str, tuple[int, int]]:
    """Documents and tokens by source."""
    found: dict[str, tuple[int, int]] = {}
    for document, n in zip(documents, tokens, strict=True):
        count, total = found.get(document.source, (0, 0))
        found[document.source] = (count + 1, total + n)
    return found


def _mark(told: CalibrationSet, document: Document, use: str) -> bytes:
    return hashlib.sha256(f"{told.seed}/{use}/{document.source}/{document.id}".encode()).digest()


def _next(rests: Sequence[int], window: Sequence[int], room: int) -> list[int]:
    """What comes into a chunk that has been begun: what fills it to the last token, else what comes next.

    Of a piece that is longer than a chunk only the rest counts: wherever it begins, it fills so much beside whole chunks.
    The largest that do it are taken, because small ones are easier to place later; sums of subsets are bits of a number.
    """
    within, reached = (1 << room + 1) - 1, [1]
    by_size = sorted(window, key=lambda n: -rests[n])
    for n in by_size:
        reached.append((reached[-1] | reached[-1] << rests[n]) & within)
    if not reached[-1] >> room & 1:
        return [window[0]]
    left, chosen = room, []
    for at in range(len(by_size), 0, -1):
        if not reached[at - 1] >> left & 1:
            chosen.append(by_size[at - 1])
            left -= rests[by_size[at - 1]]
    return chosen


def _needless(size: int, room: int, context: int) -> int:
    """Ends of chunks inside of a piece that begins with so much room, beyond those that its length makes necessary."""
    return -(-max(size - room, 0) // context) - (-(-size // context) - 1)
