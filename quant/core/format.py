"""Text formats: JSON with one spelling, digests of text, and numbers as people read them. Pure."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

GIB = 2**30
UNITS = (("kB", 10**3), ("MB", 10**6), ("GB", 10**9))


def to_canonical_json(value: Any) -> str:
    """Return JSON with one spelling: equal values give equal text.

    Keys are sorted and there are no blanks, so the text can be hashed and compared.
    """
    # Another spelling would change every key of the store: all finished work would be done again.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def to_pretty_json(value: Any) -> str:
    """Return indented JSON with a final newline. Keys keep their order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def hash_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON, in hex."""
    return hash_text(to_canonical_json(value))


def hash_texts(parts: Sequence[str]) -> str:
    """Return one sha256 for several texts in their order, in hex.

    The list is hashed as JSON, not joined: ``["ab", "c"]`` and ``["a", "bc"]`` differ.
    """
    return hash_json(list(parts))


def human_bytes(size: int) -> str:
    """Return a size for people, such as 135.2 GB or 2.7 MB.

    Units are powers of 1000, as disks and the hub count.
    """
    # 999.95 and not 1000: 999.97 kB would be printed as 1000.0 kB instead of 1.0 MB.
    unit, factor = next((u for u in UNITS if size < 999.95 * u[1]), UNITS[-1])
    return f"{size / factor:.1f} {unit}"
