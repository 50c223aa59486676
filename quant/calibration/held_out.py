"""The held-out part of a calibration set, as one evaluation text for each domain.

No importance matrix sees these documents, so a file's KLD on them is no training error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.calibration.text import CalibrationText, HeldOutText, read_held_out_texts
from quant.core import files
from quant.core.store import Store
from quant.llama.tokenizer import Tokenizer
from quant.plan.recipe import FEWEST_CHUNKS

STAGE = "held-out"
OTHER, ALL = "other", "all"
HOW = "by kind 2"
"""Version of the grouping. Raise it when the same documents give other texts."""


@dataclass(frozen=True)
class HeldOutDomains:
    """The texts that files are evaluated on."""

    paths: Mapping[str, Path]
    """Text by domain, sorted by name. Empty if too little was held out to measure anything."""
    too_short: tuple[str, ...]
    """Kinds of documents that are in no text, because too few were held out."""


def split_by_domain(
    text: CalibrationText, context: int, tokenizer: Tokenizer, store: Store
) -> HeldOutDomains:
    """Write the held-out part of a calibration text as one text for each domain.

    Args:
        text: The calibration text, which has a held-out part.
        context: Tokens in a chunk of the evaluation.
        tokenizer: Counts tokens as the model does.
        store: Keeps the texts.
    """
    assert text.held_out
    inputs = {
        "held_out": text.facts["held_out_sha256"],
        "tokenizer": tokenizer.digest,
        "context": context,
        "fewest": FEWEST_CHUNKS,
        "how": HOW,
    }
    documents = read_held_out_texts(text.held_out)

    def make(partial: Path) -> dict[str, Any]:
        texts = group_by_domain(documents, lambda part: tokenizer.count(part) // context)
        for name, part in texts.items():
            files.write_text(partial / f"{name}.txt", part)
        return {"domains": sorted(texts), "too_short": list_short_kinds(documents, texts)}

    result = store.run_once(STAGE, inputs, make)
    return HeldOutDomains(
        {n: result.path(f"{n}.txt") for n in result.facts["domains"]},
        tuple(result.facts["too_short"]),
    )


def describe_short_kinds(kinds: Sequence[str]) -> str:
    """Return a line about the kinds that are not measured. Empty if all are."""
    return f"not measured, too little held-out text: {', '.join(kinds)}" if kinds else ""


def list_short_kinds(documents: tuple[HeldOutText, ...], texts: Mapping[str, str]) -> list[str]:
    """Return the kinds of documents that are in none of the texts."""
    # A pool contains every kind that is too short alone.
    return [] if {OTHER, ALL} & texts.keys() else sorted({d.kind for d in documents} - texts.keys())


def group_by_domain(
    documents: tuple[HeldOutText, ...], count_chunks: Callable[[str], int]
) -> Mapping[str, str]:
    """Join documents to one text for each domain.

    A kind of documents with at least FEWEST_CHUNKS chunks is a domain. The others are pooled as
    ``other``, or as ``all`` if there is no domain. A pool that is still too short is left out: its
    confidence interval would say nothing.

    Args:
        documents: Held-out documents.
        count_chunks: Returns the number of whole chunks in a text.
    """
    kinds: dict[str, str] = {}
    for d in documents:
        kinds[d.kind] = kinds.get(d.kind, "") + d.text
    texts = {kind: part for kind, part in kinds.items() if count_chunks(part) >= FEWEST_CHUNKS}
    rest = "".join(part for kind, part in kinds.items() if kind not in texts)
    if rest and count_chunks(rest) >= FEWEST_CHUNKS:
        texts[OTHER if texts else ALL] = rest
    return texts
