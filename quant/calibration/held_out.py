"""The part of a calibration set that no importance matrix saw, as a text for each domain that files are measured on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.calibration.text import CalibrationText, HeldOutText, held_out_texts
from quant.core import files
from quant.core.store import Store
from quant.llama.tokenizer import Tokenizer
from quant.plan.recipe import FEWEST_CHUNKS

STAGE = "held-out"
OTHER, ALL = "other", "all"
HOW = "by kind 2"
"""Names the way in which the texts are put together; another way is another text."""


@dataclass(frozen=True)
class HeldOutDomains:
    """What files are measured on."""

    paths: Mapping[str, Path]
    """A text for each domain, in the order of their names; none where too little was held out to mean anything."""
    too_short: tuple[str, ...]
    """Kinds of documents of which too little was held out, alone and together."""


def split_by_domain(
    text: CalibrationText, context: int, tokenizer: Tokenizer, store: Store
) -> HeldOutDomains:
    """The part of a set that was held out, by domain."""
    assert text.held_out
    inputs = {
        "held_out": text.facts["held_out_sha256"],
        "tokenizer": tokenizer.digest,
        "context": context,
        "fewest": FEWEST_CHUNKS,
        "how": HOW,
    }
    documents = held_out_texts(text.held_out)

    def make(partial: Path) -> dict[str, Any]:
        found = by_domain(documents, lambda part: tokenizer.count(part) // context)
        for name, part in found.items():
            files.write_text(partial / f"{name}.txt", part)
        return {"domains": sorted(found), "too_short": too_short(documents, found)}

    done = store.run_once(STAGE, inputs, make)
    return HeldOutDomains(
        {n: done.path(f"{n}.txt") for n in done.facts["domains"]}, tuple(done.facts["too_short"])
    )


def left_out(too_short: Sequence[str]) -> str:
    """In words, which kinds are not measured; nothing when all are."""
    return f"not measured, too little held-out text: {', '.join(too_short)}" if too_short else ""


def too_short(documents: tuple[HeldOutText, ...], found: Mapping[str, str]) -> list[str]:
    """Kinds of documents that are in none of the texts."""
    return [] if {OTHER, ALL} & found.keys() else sorted({d.kind for d in documents} - found.keys())


def by_domain(
    documents: tuple[HeldOutText, ...], chunks: Callable[[str], int]
) -> Mapping[str, str]:
    """A text for each kind of document that fills enough chunks; those that do not make one together.

    What is still too short is left out, unless nothing else is there: then all of it is one text, if that is long enough.
    """
    kinds: dict[str, str] = {}
    for d in documents:
        kinds[d.kind] = kinds.get(d.kind, "") + d.text
    found = {kind: part for kind, part in kinds.items() if chunks(part) >= FEWEST_CHUNKS}
    rest = "".join(part for kind, part in kinds.items() if kind not in found)
    if rest and chunks(rest) >= FEWEST_CHUNKS:
        found[OTHER if found else ALL] = rest
    return found
