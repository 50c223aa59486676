"""Drop near duplicates among documents (MinHash). Pure.

A document is represented by a sketch: the smallest hashes of its word sequences. The overlap of two
sketches estimates the Jaccard similarity of the documents, without comparing every pair (Broder,
"On the resemblance and containment of documents", 1997). Kept by hand: datasketch would be a
dependency for these lines, and its hash would decide which documents a release was made of.
"""

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from quant.calibration.documents import Document

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
"""A word. Each kana and Han character is one, because these scripts have no spaces."""
SHINGLE_WORDS = 5
# The standard error of an estimate J is sqrt(J (1 - J) / SKETCH_SIZE): 0.06 at J = 0.5.
SKETCH_SIZE = 64
MAX_SIMILARITY = 0.5
"""Largest Jaccard similarity of word sequences that two documents may have."""


def drop_duplicates(
    documents: Sequence[Document], max_similarity: float = MAX_SIMILARITY
) -> tuple[Document, ...]:
    """Return the documents in order, without those that are too similar to one before them."""
    owners: dict[int, list[int]] = defaultdict(list)  # sketches that contain a hash
    kept: list[Document] = []
    sketches: list[frozenset[int]] = []
    for document in documents:
        own = sketch(document.words())
        shared = Counter(owner for part in own for owner in owners[part])
        # The count of shared hashes only preselects, with a margin of two: near the limit the
        # union of both sketches decides.
        if any(
            similarity(own, sketches[other]) > max_similarity
            for other, n in shared.items()
            if n > len(own) * max_similarity / 2
        ):
            continue
        for part in own:
            owners[part].append(len(kept))
        kept.append(document)
        sketches.append(own)
    return tuple(kept)


def sketch(text: str) -> frozenset[int]:
    """Return the SKETCH_SIZE smallest hashes of a text's word sequences."""
    words = WORD.findall(text.casefold())
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(words[n : n + SHINGLE_WORDS]) for n in range(count)}
    # Not hash(): Python seeds it anew in each process, so each run would drop other documents.
    hashes = (
        int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "big") for s in shingles
    )
    return frozenset(heapq.nsmallest(SKETCH_SIZE, hashes))


def similarity(a: frozenset[int], b: frozenset[int]) -> float:
    """Return the estimated Jaccard similarity of two texts by their sketches."""
    # The smallest hashes of the union are a uniform sample of its word sequences. The fraction of
    # the sample that is in both sketches estimates |A and B| / |A or B|.
    smallest = frozenset(heapq.nsmallest(SKETCH_SIZE, a | b))
    return len(smallest & a & b) / max(len(smallest), 1)
