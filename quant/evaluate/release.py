"""The evaluation of a release: every variant against the BF16 file, on held-out text.

A build fails only for a broken file: NaN, or a mean KLD or a loss on the text above the recipe's
``evaluation.worst``. A limit of quality would be a matter of taste, and the smoke test asks for
behavior already. About dominated files it only warns: see :mod:`quant.evaluate.pareto`.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.calibration import held_out
from quant.calibration.text import CalibrationText
from quant.core import files
from quant.core.errors import CheckError
from quant.core.format import GIB
from quant.core.store import Store
from quant.evaluate.compare import SMALL_BYTES, EvaluationSettings, measure_files
from quant.evaluate.figures import round_figure, round_figures
from quant.evaluate.pareto import DominatedFile, find_dominated
from quant.evaluate.scores import Evaluation, compute_perplexity, estimate_difference
from quant.llama.model import bindings_version
from quant.llama.model_file import ModelFile
from quant.llama.tensors import is_matrix, tensor_class
from quant.llama.tokenizer import Tokenizer
from quant.llama.toolchain import Toolchain
from quant.plan.recipe import ModelRecipe
from quant.quantize.shard import VariantFile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleaseEvaluation:
    """The figures of a release, as its manifest has them: KLD in nats, top-1 from 0 to 1."""

    settings: Mapping[str, Any]
    """How the texts were read: ``context``, ``top``, and the build of ``llama.cpp``."""
    texts: Mapping[str, str]
    """By domain, the sha256 of the text."""
    base: Mapping[str, Any]
    """The BF16 file's ``ppl``, and its ``ppl`` and number of ``chunks`` in each of ``domains``."""
    files: Mapping[str, Mapping[str, Any]]
    """By variant, the rounded :func:`~quant.evaluate.scores.compute_figures`, and ``errors``."""
    dominated: tuple[DominatedFile, ...]
    too_short: tuple[str, ...] = ()
    """Domains that were not measured: too little of their text is held out."""

    def json(self) -> dict[str, Any]:
        """Return what all variants share, as the manifest has it: keys are part of its format."""
        dominated = [
            {
                "file": d.file,
                "by": d.by,
                "ladder": d.in_ladder,
                "kld_mean": round_figure(d.gap.value),
                "kld_mean_low": round_figure(d.gap.low),
                "kld_mean_high": round_figure(d.gap.high),
                "said": str(d),
            }
            for d in self.dominated
        ]
        return {
            **self.settings,
            "texts": dict(self.texts),
            "too_short": list(self.too_short),
            "base": self.base,
            "beaten": dominated,
        }


def evaluate_release(
    variants: Sequence[VariantFile],
    base: ModelFile,
    text: CalibrationText,
    recipe: ModelRecipe,
    tools: Toolchain,
    store: Store,
) -> ReleaseEvaluation | None:
    """Return the figures of all variants, or None if the set holds out too little text.

    Args:
        variants: The files of the release; a variant of BF16 is not read, its KLD is 0.
        base: The BF16 file.
        text: The calibration text, which has the documents that are held out.
        recipe: Its ``evaluation`` says how much is read, and which mean KLD is too large.
        tools: llama.cpp's tools, which tokenize the held-out text.
        store: Where scores are kept.

    Raises:
        CheckError: If a file's mean KLD or loss exceeds ``evaluation.worst``, or is NaN.
    """
    rules = recipe.evaluation
    domains = held_out.split_by_domain(text, rules.context, Tokenizer(base, tools), store)
    if not (texts := domains.paths):
        log.warning(
            "evaluate: nothing is measured: the held-out text of %s is too short", text.name
        )
        return None
    if domains.too_short:
        log.warning("evaluate: %s", held_out.describe_short_kinds(domains.too_short))
    sizes = [base.bytes, *(v.bytes for v in variants)]
    log.info("evaluate: %s", forecast_reading(sizes, len(texts), recipe))
    settings = EvaluationSettings(rules.context, rules.chunks, _choose_threads(base), rules.top)
    # The base comes first, for its own perplexity. A variant of BF16 has its digest, though it may
    # be cut into shards: it is not read.
    digests = {base.path: base.digest} | {
        v.file.path: base.digest if v.plan.is_base else v.file.digest for v in variants
    }
    of_base, *rest = measure_files(base, digests, texts, store, settings)
    evaluations = {v.name: e for v, e in zip(variants, rest, strict=True)}
    if broken := tuple(find_broken(evaluations, rules.worst)):
        raise CheckError(*broken)
    return ReleaseEvaluation(
        settings={
            "context": rules.context,
            "top": rules.top,
            "llama.cpp": bindings_version(),
        },
        texts={domain: files.hash_file(path) for domain, path in texts.items()},
        base=_summarize_base(of_base),
        files={
            v.name: round_figures(
                evaluations[v.name].figures() | {"errors": errors_by_class(v.errors)}
            )
            for v in variants
        },
        dominated=_find_dominated(evaluations),
        too_short=domains.too_short,
    )


def errors_by_class(errors: Mapping[str, float]) -> dict[str, float]:
    """Return the mean quantization error of each tensor class, in file order.

    Args:
        errors: By tensor, the relative weighted MSE. Norms and biases are not quantized, and left
            out.
    """
    by_class: dict[str, list[float]] = {}
    for name, error in errors.items():
        if is_matrix(name):
            by_class.setdefault(tensor_class(name), []).append(error)
    return {kind: sum(values) / len(values) for kind, values in by_class.items()}


def forecast_reading(sizes: Sequence[int], domains: int, recipe: ModelRecipe) -> str:
    """Return a line about how much an evaluation reads from disk, at most.

    Args:
        sizes: Bytes of each file.
        domains: Number of texts.
        recipe: Its ``evaluation`` has the number of chunks.
    """
    rules = recipe.evaluation
    chunks = domains * rules.chunks
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # llama.cpp maps a file. One that fits into memory is read once; of a larger one each pass over
    # the layers evicts what the next pass needs first, so every chunk reads it again.
    once = sum(size for size in sizes if size < memory)
    again = sum(size for size in sizes if size >= memory) * chunks
    more = ", most of it again for each chunk, because it does not fit into memory" if again else ""
    return (
        f"{len(sizes)} files read at most {chunks} chunks of {rules.context} tokens each in"
        f" {domains} domains: about {max((once + again) / GIB, 0.1):,.1f} GiB from disk{more}"
    )


def find_broken(evaluations: Mapping[str, Evaluation], worst: float) -> Iterator[str]:
    """Yield a line for each file that is broken rather than coarse.

    The loss is asked beside the KLD: a KLD over the most likely tokens alone is a lower bound,
    while a loss above the base's by ``worst`` nats (a factor of ``exp(worst)`` in perplexity)
    cannot be missed.

    Args:
        evaluations: By variant.
        worst: The recipe's ``evaluation.worst``, in nats.
    """
    for name, evaluation in evaluations.items():
        scores = evaluation.overall
        kld = float(scores.kld.mean())
        loss = float(scores.nll.mean() - scores.base_nll.mean())
        for what, value in (("mean KLD", kld), ("loss on the text, over BF16's,", loss)):
            if value > worst:
                yield (
                    f"{name}: {what} is {value:.2f} nats, expected at most {worst:g}"
                    " (evaluation.worst of the recipe): the file is broken, or its bits are too few"
                )


def _summarize_base(base: Evaluation) -> dict[str, Any]:
    domains = {
        name: {"chunks": len(s.nll), "ppl": round_figure(compute_perplexity(s), 4)}
        for name, s in base.scores.items()
    }
    return {"ppl": round_figure(compute_perplexity(base.overall), 4), "domains": domains}


def _find_dominated(evaluations: Mapping[str, Evaluation]) -> tuple[DominatedFile, ...]:
    # find_dominated asks for the KLD of a less that of b; estimate_difference returns the second
    # less the first.
    return find_dominated(
        {name: e.bytes for name, e in evaluations.items()},
        lambda a, b: estimate_difference(evaluations[b].overall, evaluations[a].overall),
    )


def _choose_threads(base: ModelFile) -> int:
    """Return how many threads read: one for a small model, which is faster than sharing."""
    return 1 if base.bytes < SMALL_BYTES else len(os.sched_getaffinity(0))
