"""What a release says of how good its files are: every variant against the BF16 file, on text that was held out.

Figures are rounded to the digits that do not change from machine to machine but by the rarest chance (three of a
divergence, four of a perplexity); a rebuild on another processor, where sums are added up in another order, allows for them.

Only nonsense stops a build: what is NaN or infinite, and a file that is further from its base than the recipe's ``worst``,
in mean KLD or in loss on the text. A threshold of quality would be a matter of taste, and smoke tests ask that already.
Files that a smaller one beats are told, with the numbers, and stop nothing: see :mod:`quant.evaluate.pareto`.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import Any

from quant.calibration import held_out
from quant.calibration.text import CalibrationText
from quant.core import files
from quant.core.files import Receipt
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.errors import CheckError
from quant.evaluate.compare import (
    SMALL_BYTES,
    Evaluation,
    EvaluationSettings,
    difference,
    measure_files,
    perplexity,
)
from quant.evaluate.pareto import DominatedFile, Gap
from quant.evaluate.pareto import find_dominated as beaten
from quant.llama.model import bindings_version
from quant.llama.model_file import ModelFile
from quant.llama.tensors import is_matrix, tensor_class
from quant.llama.tokenizer import Tokenizer
from quant.llama.toolchain import Toolchain
from quant.plan.recipe import ModelRecipe
from quant.quantize.shard import VariantFile


def figure_words(figures: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Perplexity, KLD with half of its interval, and top-1 agreement, for a table; of a file that was not measured, dashes."""
    if not figures:
        return "-", "-", "-"
    spread = (figures["kld_mean_high"] - figures["kld_mean_low"]) / 2
    kld = f"{plain(figures['kld_mean'])} ± {plain(spread, 2)}" if figures["kld_mean"] else "0"
    return f"{figures['ppl']:.4g}", kld, f"{100 * figures['top1']:.1f} %"


def plain(value: float, digits: int = 3) -> str:
    """A small number with so many digits that count, without an exponent."""
    return f"{value:.{max(digits - 1 - floor(log10(value)), 0)}f}" if value > 0 else "0"


log = logging.getLogger(__name__)
DIGITS = {"ppl": 4, "ppl_base": 4, "top1": 4}
"""That are told of a figure; three of all others."""
GIB = 2**30


@dataclass(frozen=True)
class ReleaseEvaluation:
    """The figures of a release."""

    settings: Mapping[str, Any]
    """How the texts were read."""
    texts: Mapping[str, str]
    """By domain, the sha256 of the text."""
    base: Mapping[str, Any]
    """What is told of the base itself: its perplexity, and how many chunks of each domain were read."""
    files: Mapping[str, Mapping[str, Any]]
    """By variant, the figures."""
    beaten: tuple[DominatedFile, ...]
    too_short: tuple[str, ...] = ()
    """Domains of which too little text was held out to measure them."""

    def json(self) -> dict[str, Any]:
        """As a manifest tells what all files share."""
        told = [
            {
                "file": b.file,
                "by": b.by,
                "ladder": b.in_ladder,
                "kld_mean": round_figure(b.gap.value),
                "kld_mean_low": round_figure(b.gap.low),
                "kld_mean_high": round_figure(b.gap.high),
                "said": str(b),
            }
            for b in self.beaten
        ]
        return {
            **self.settings,
            "texts": dict(self.texts),
            "too_short": list(self.too_short),
            "base": self.base,
            "beaten": told,
        }


def evaluate_release(
    made: Sequence[VariantFile],
    base: ModelFile,
    text: CalibrationText,
    model: ModelRecipe,
    tools: Toolchain,
    store: Store,
) -> ReleaseEvaluation | None:
    """The figures of all variants; nothing when the set holds too little text out.

    Raises CheckFailed for files that are further from the base than the recipe allows.
    """
    told = model.evaluation
    held = held_out.split_by_domain(text, told.context, Tokenizer(base.path, tools), store)
    if not (texts := held.paths):
        log.warning(
            "evaluate: nothing is measured: %s holds too little text out to mean anything",
            text.name,
        )
        return None
    if held.too_short:
        log.warning("evaluate: %s", held_out.left_out(held.too_short))
    paths = {v.paths[0]: base.digest if v.plan.is_base else _digest(v.receipts) for v in made}
    log.info(
        "evaluate: %s",
        forecast_seconds([base.bytes, *(v.bytes for v in made)], len(texts), model),
    )
    settings = EvaluationSettings(told.context, told.chunks, _threads(base.bytes), told.top)
    digests = {base.path: base.digest, **paths}
    whole, *rest = measure_files(base.path, base.digest, digests, texts, store, settings)
    named = {v.name: e for v, e in zip(made, rest, strict=True)}
    if wrong := tuple(_nonsense(named, told.worst)):
        raise CheckError(*wrong)
    domains = {
        name: {"chunks": len(r.nll), "ppl": round_figure(perplexity(r), 4)}
        for name, r in whole.readings.items()
    }
    return ReleaseEvaluation(
        {"context": told.context, "top": told.top, "llama.cpp": bindings_version()},
        {name: files.hash_file(path) for name, path in texts.items()},
        {"ppl": round_figure(perplexity(whole.whole), 4), "domains": domains},
        {
            v.name: round_figures(e.figures() | {"errors": errors_by_class(v.errors)})
            for v, e in zip(made, rest, strict=True)
        },
        beaten({n: e.bytes for n, e in named.items()}, lambda a, b: _gap(named[a], named[b])),
        held.too_short,
    )


def errors_by_class(errors: Mapping[str, float]) -> dict[str, float]:
    """Mean error of the matrices of each class, in the order of the file; norms and biases are kept as they are."""
    found: dict[str, list[float]] = {}
    for name, error in errors.items():
        if is_matrix(name):
            found.setdefault(tensor_class(name), []).append(error)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def forecast_seconds(sizes: Sequence[int], domains: int, model: ModelRecipe) -> str:
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


def round_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with the digits that are told, domains alike."""
    return {
        k: round_figures(v) if isinstance(v, Mapping) else round_figure(v, DIGITS.get(k, 3))
        for k, v in figures.items()
    }


def round_figure(value: Any, digits: int = 3) -> Any:
    """A number with so many digits that count; a count stays as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def figures_close(known: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two machines can have found these for the same file.

    The mean lies within the other's interval or a twentieth beside it, perplexities are a hundredth apart at most, and the
    share of the same likeliest words as well.
    """
    spread = max(
        known["kld_mean_high"] - known["kld_mean"], known["kld_mean"] - known["kld_mean_low"]
    )
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
    return (
        receipts[0].sha256
        if len(receipts) == 1
        else to_canonical_json([r.sha256 for r in receipts])
    )


def _threads(size: int) -> int:
    return 1 if size < SMALL_BYTES else len(os.sched_getaffinity(0))
