"""What a release says of how good its files are: every variant against the BF16 file, on text that was held out.

Figures are rounded to the digits that do not change from machine to machine but by the rarest chance (three of a
divergence, four of a perplexity); a rebuild on another processor, where sums are added up in another order, allows for them.

Only nonsense stops a build: what is NaN or infinite, and a file that is further from its base than the recipe's ``worst``,
in mean KLD or in loss on the text. A threshold of quality would be a matter of taste, and smoke tests ask that already.
Files that a smaller one beats are told, with the numbers, and stop nothing: see :mod:`quant.frontier`.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant import files, held_out
from quant.calibrate import CalibrationText
from quant.convert import Base
from quant.errors import CheckFailed
from quant.evaluate import SMALL_BYTES, Evaluation, Settings, difference, measure, perplexity, scorer_version
from quant.files import Receipt
from quant.frontier import Beaten, Gap, beaten
from quant.pictures import class_of, is_matrix
from quant.recipe import Model
from quant.shard import Sharded
from quant.store import Store
from quant.tokens import Tokenizer
from quant.toolchain import Toolchain

log = logging.getLogger(__name__)
DIGITS = {"ppl": 4, "ppl_base": 4, "top1": 4}
"""That are told of a figure; three of all others."""
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """The figures of a release."""

    settings: Mapping[str, Any]
    """How the texts were read."""
    texts: Mapping[str, str]
    """By domain, the sha256 of the text."""
    base: Mapping[str, Any]
    """What is told of the base itself: its perplexity, and how many chunks of each domain were read."""
    files: Mapping[str, Mapping[str, Any]]
    """By variant, the figures."""
    beaten: tuple[Beaten, ...]
    too_short: tuple[str, ...] = ()
    """Domains of which too little text was held out to measure them."""

    def json(self) -> dict[str, Any]:
        """As a manifest tells what all files share."""
        told = [
            {"file": b.file, "by": b.by, "ladder": b.in_ladder, "kld_mean": rounded(b.gap.value),
             "kld_mean_low": rounded(b.gap.low), "kld_mean_high": rounded(b.gap.high), "said": str(b)}
            for b in self.beaten
        ]  # fmt: skip
        return {
            **self.settings,
            "texts": dict(self.texts),
            "too_short": list(self.too_short),
            "base": self.base,
            "beaten": told,
        }


def measured(
    made: Sequence[Sharded], base: Base, text: CalibrationText, model: Model, tools: Toolchain, store: Store
) -> Measured | None:
    """The figures of all variants; nothing when the set holds too little text out.

    Raises CheckFailed for files that are further from the base than the recipe allows.
    """
    told = model.evaluation
    held = held_out.texts(text, told.context, Tokenizer(base.path, tools), store)
    if not (texts := held.paths):
        log.warning("evaluate: nothing is measured: %s holds too little text out to mean anything", text.name)
        return None
    if held.too_short:
        log.warning("evaluate: %s", held_out.left_out(held.too_short))
    paths = {v.paths[0]: base.receipt.sha256 if v.plan.is_base else _digest(v.receipts) for v in made}
    log.info("evaluate: %s", forecast([base.receipt.bytes, *(v.bytes for v in made)], len(texts), model))
    settings = Settings(told.context, told.chunks, _threads(base.receipt.bytes), told.top)
    digests = {base.path: base.receipt.sha256, **paths}
    whole, *rest = measure(base.path, base.receipt.sha256, digests, texts, store, settings)
    named = {v.name: e for v, e in zip(made, rest, strict=True)}
    if wrong := tuple(_nonsense(named, told.worst)):
        raise CheckFailed(*wrong)
    domains = {name: {"chunks": len(r.nll), "ppl": rounded(perplexity(r), 4)} for name, r in whole.readings.items()}
    return Measured(
        {"context": told.context, "top": told.top, "llama.cpp": scorer_version()},
        {name: files.digest(path) for name, path in texts.items()},
        {"ppl": rounded(perplexity(whole.whole), 4), "domains": domains},
        {v.name: stable(e.figures() | {"errors": by_class(v.errors)}) for v, e in zip(made, rest, strict=True)},
        beaten({n: e.bytes for n, e in named.items()}, lambda a, b: _gap(named[a], named[b])),
        held.too_short,
    )


def by_class(errors: Mapping[str, float]) -> dict[str, float]:
    """Mean error of the matrices of each class, in the order of the file; norms and biases are kept as they are."""
    found: dict[str, list[float]] = {}
    for name, error in errors.items():
        if is_matrix(name):
            found.setdefault(class_of(name), []).append(error)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def forecast(sizes: Sequence[int], domains: int, model: Model) -> str:
    """What measuring files of these sizes will read, in a line."""
    told = model.evaluation
    chunks = domains * told.chunks
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    once = sum(size for size in sizes if size < room)
    again = sum(size for size in sizes if size >= room) * chunks
    more = ", most of it again for each chunk, because it does not fit into memory" if again else ""
    return (
        f"{len(sizes)} files read at most {chunks} chunks of {told.context} tokens each in {domains} domains:"
        f" about {max((once + again) / GIB, 0.1):,.1f} GiB from disk{more}"
    )


def stable(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with the digits that are told, domains alike."""
    return {k: stable(v) if isinstance(v, Mapping) else rounded(v, DIGITS.get(k, 3)) for k, v in figures.items()}


def rounded(value: Any, digits: int = 3) -> Any:
    """A number with so many digits that count; a count stays as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def close(known: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two machines can have found these for the same file.

    The mean lies within the other's interval or a twentieth beside it, perplexities are a hundredth apart at most, and the
    share of the same likeliest words as well.
    """
    spread = max(known["kld_mean_high"] - known["kld_mean"], known["kld_mean"] - known["kld_mean_low"])
    return bool(
        abs(found["kld_mean"] - known["kld_mean"]) <= max(spread, known["kld_mean"] / 20, 1e-5)
        and abs(found["ppl"] - known["ppl"]) <= known["ppl"] / 100
        and abs(found["top1"] - known["top1"]) <= 0.01
    )


def _nonsense(found: Mapping[str, Evaluation], worst: float) -> Iterator[str]:
    for name, e in found.items():
        r = e.whole
        kld, loss = float(r.kld.mean()), float(r.nll.mean() - r.base_nll.mean())
        for what, value in (("mean KLD", kld), ("loss on the text, over BF16's,", loss)):
            if value > worst:
                yield (
                    f"{name}: {what} is {value:.2f} nats, expected at most {worst:g} (evaluation.worst of the recipe): the file"
                    " is broken, or its bits are too few"
                )


def _gap(first: Evaluation, second: Evaluation) -> Gap:
    found = difference(second.whole, first.whole)
    return Gap(found.value, found.low, found.high)


def _digest(receipts: Sequence[Receipt]) -> str:
    return receipts[0].sha256 if len(receipts) == 1 else files.canonical([r.sha256 for r in receipts])


def _threads(size: int) -> int:
    return 1 if size < SMALL_BYTES else len(os.sched_getaffinity(0))
