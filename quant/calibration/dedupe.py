"""Drop documents that say nearly the same as one before. Pure.

A document is known by a sketch of its word sequences: the smallest digests of all. How many two sketches share tells how
much their documents do, without comparing every document with every other (Broder, 1997).
"""

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from quant.calibration.documents import Document

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
"""Kana and Han stand for themselves: they have no spaces."""
WORDS_IN_A_SEQUENCE = 5
SKETCH = 64
ALIKE = 0.5
"""The share of their sequences that two documents may have in common."""


def drop_duplicates(documents: Sequence[Document], alike: float = ALIKE) -> tuple[Document, ...]:
    """The documents, in order, without those that share too much with one before."""
    owners: dict[int, list[int]] = defaultdict(list)
    kept: list[Document] = []
    sketches: list[frozenset[int]] = []
    for document in documents:
        own = sketch(document.words())
        shared = Counter(owner for part in own for owner in owners[part])
        if any(
            similarity(own, sketches[other]) > alike
            for other, n in shared.items()
            if n > len(own) * alike / 2
        ):
            continue
        for part in own:
            owners[part].append(len(kept))
        kept.append(document)
        sketches.append(own)
    return tuple(kept)


def sketch(text: str) -> frozenset[int]:
    """The smallest digests of a text's word sequences."""
    words = WORD.findall(text.casefold())
    count = max(1, len(words) - WORDS_IN_A_SEQUENCE + 1)
    sequences = {" ".join(words[n : n + WORDS_IN_A_SEQUENCE]) for n in range(count)}
    digests = (
        int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "big")
        for s in sequences
    )
    return frozenset(heapq.nsmallest(SKETCH, digests))


def similarity(a: frozenset[int], b: frozenset[int]) -> float:
    """About the share of sequences that two texts have in common."""
    smallest = frozenset(heapq.nsmallest(SKETCH, a | b))
    return len(smallest & a & b) / max(len(smallest), 1)
