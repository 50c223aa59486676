"""What ``quant evaluate`` does: from paths to figures, on held-out texts if none are named."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.calibration.held_out import HeldOutDomains
from quant.core.store import Store
from quant.evaluate.compare import EvaluationSettings, evaluate_models
from quant.evaluate.scores import Estimate, Evaluation, estimate_difference
from quant.evaluate.texts import name_domains, prepare_held_out
from quant.llama import toolchain
from quant.llama.model_file import ModelFile


@dataclass(frozen=True)
class EvaluationRequest:
    """Files to measure against their base, and what to measure them on."""

    base: Path
    """The BF16 file. Of every split model, here and below, the first shard is named."""
    paths: tuple[Path, ...]
    peers: tuple[Path, ...] = ()
    """Files to compare with, which charts show by another mark."""
    texts: tuple[Path, ...] = ()
    """UTF-8 texts, each named by its domain. None: the held-out part of the calibration set."""
    calibration_set: str = "embedded"
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    work: Path | None = None
    """Where scores are kept. None keeps nothing."""
    llama_cpp: Path | None = None
    """Folder of llama.cpp's tools, which tokenize a calibration set. None searches."""


@dataclass(frozen=True)
class Comparison:
    """The figures of files against one base."""

    base: ModelFile
    files: tuple[ModelFile, ...]
    """Peers come last."""
    evaluations: tuple[Evaluation, ...]
    """Of each file."""
    peers: frozenset[Path] = frozenset()
    """Those of the files, by their paths, that are only to compare with."""
    too_short: tuple[str, ...] = ()
    """Domains that were not measured: too little of their text is held out."""

    @property
    def difference(self) -> Estimate | None:
        """Mean KLD of the second file less that of the first, if there are exactly two."""
        if len(self.evaluations) != 2:
            return None
        first, second = self.evaluations
        return estimate_difference(first.overall, second.overall)

    def json(self) -> dict[str, Any]:
        """Return the document that ``quant evaluate --json`` prints."""
        document: dict[str, Any] = {
            "base": self.base.path.name,
            "files": [e.json() for e in self.evaluations],
        }
        if gap := self.difference:
            document["difference"] = {"kld_mean": gap.value, "low": gap.low, "high": gap.high}
        return document


def evaluate_files(request: EvaluationRequest) -> Comparison:
    """Measure files against their base: perplexity, KLD and top-1 agreement, with 95 % intervals.

    Args:
        request: The files, and what to measure them on.

    Returns:
        The figures of each file, over all text and by domain.

    Raises:
        InputError: If a text is too short, or a file is of another model than the base.
        CheckError: If a file's probabilities are NaN or infinite.

    Example:
        >>> request = EvaluationRequest(Path("BF16.gguf"), (Path("Q4_K_M.gguf"),))
        >>> evaluate_files(request).json()["files"][0]["kld_mean"]  # doctest: +SKIP
        0.0123
    """
    base = ModelFile.open(request.base)
    # A file named twice is measured, and shown, once.
    paths = dict.fromkeys((*request.paths, *request.peers))
    # The same object for the base: its shards are hashed once.
    models = tuple(base if p == request.base else ModelFile.open(p) for p in paths)
    with tempfile.TemporaryDirectory(prefix="quant-evaluate-") as temporary:
        store = Store((request.work or Path(temporary)).resolve())
        texts = _prepare_texts(request, base, store)
        evaluations = evaluate_models(
            base=base, models=models, texts=texts.paths, store=store, settings=request.settings
        )
    return Comparison(
        base=base,
        files=models,
        evaluations=evaluations,
        peers=frozenset(request.peers),
        too_short=texts.too_short,
    )


def _prepare_texts(request: EvaluationRequest, base: ModelFile, store: Store) -> HeldOutDomains:
    if request.texts:
        return HeldOutDomains(name_domains(request.texts), ())
    tools = toolchain.find_toolchain(request.llama_cpp)
    return prepare_held_out(
        request.calibration_set,
        base=base,
        context=request.settings.context,
        tools=tools,
        store=store,
    )
