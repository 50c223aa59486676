"""Compare quantized files with their base: perplexity, KLD and top-1 agreement, by domain.

The base reads each text once, and its log-probabilities are kept in the store. Files are compared
with them token by token: the same tokens, batch, threads and build of llama.cpp. So a file with the
base's weights has a KLD of exactly 0, and no other batch size adds noise to a difference.

:mod:`quant.evaluate.scorer` reads, in a process of its own. :mod:`quant.evaluate.scores` has the
statistics.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from quant.core import child, files, progress
from quant.core.errors import CheckError, raise_problems
from quant.core.store import Store, StoredResult
from quant.evaluate.scorer import ABOUT
from quant.evaluate.scores import Evaluation, TokenScores
from quant.llama.model import bindings_version
from quant.llama.model_file import ModelFile
from quant.plan.recipe import FEWEST_CHUNKS

STAGE, BASE_STAGE = "evaluate", "evaluate-base"
SMALL_BYTES = 10**8
"""Files smaller than this share one process, which scores them one after the other."""
FileAndDomain: TypeAlias = tuple[Path, str]


@dataclass(frozen=True)
class EvaluationSettings:
    """How texts are read. Files can be compared only if they were read alike.

    The store's keys are made of these fields: another name makes finished work unusable.
    """

    context: int = 512
    """Tokens in a chunk, of which the second half is predicted; llama-perplexity's default."""
    chunks: int | None = None
    """Maximum number of chunks of each text. None reads the whole text."""
    threads: int = 2
    top: int = 4096
    """Tokens of the base that are kept for each prediction; all others count as one event.

    On text with a perplexity of 65, a quarter of tiny-glm's vocabulary gave 90 % of the KLD, and
    half of it more.
    """


def evaluate_models(
    base: ModelFile,
    models: Sequence[ModelFile],
    texts: Mapping[str, Path],
    store: Store,
    settings: EvaluationSettings | None = None,
) -> tuple[Evaluation, ...]:
    """Return the evaluation of each file against its base.

    What is in the store is not measured again.

    Args:
        base: The BF16 file, or whatever others are to be compared with.
        models: The files to compare; the base may be among them.
        texts: A file of UTF-8 text for each domain.
        store: Where scores are kept, by the digests of base, file and text.
        settings: How the texts are read.

    Returns:
        An evaluation for each file, in the order of ``models``.

    Raises:
        InputError: If a text has too few chunks, or a file is of another model than the base.
        CheckError: If a file's probabilities are NaN or infinite.
    """
    raise_problems(_find_foreign(base, models))
    digests = {m.path: base.digest if m.path == base.path else m.digest for m in models}
    return measure_files(base, digests, texts, store, settings or EvaluationSettings())


def measure_files(
    base: ModelFile,
    digests: Mapping[Path, str],
    texts: Mapping[str, Path],
    store: Store,
    settings: EvaluationSettings,
) -> tuple[Evaluation, ...]:
    """Return the evaluation of files whose contents are known to be of the base's model.

    Args:
        base: What the files are compared with.
        digests: For each file, or first shard, what identifies its contents. A file with the base's
            digest is not read: its KLD is 0.
        texts: A file of UTF-8 text for each domain.
        store: Where scores are kept.
        settings: How the texts are read.

    Raises:
        InputError: If a text has too few chunks.
        CheckError: If a file's probabilities are NaN or infinite.
    """
    bases = _score_base(base, texts, store, settings)
    # A file's scores depend on everything that the base's do, and on the file.
    keys = {
        (path, domain): {**b.inputs, "file": digest}
        for path, digest in digests.items()
        if digest != base.digest
        for domain, b in bases.items()
    }
    sizes = {p: sum(part.stat().st_size for part in ModelFile.open(p).paths) for p in digests}
    missing = [at for at, key in keys.items() if not store.find(STAGE, key)]
    # Every batch is committed by itself: an interrupted run continues with the next file.
    for done, batch in enumerate(_split_batches(missing, sizes)):
        folders = {at: store.begin(STAGE, keys[at]) for at in batch}
        parts = (
            {**_describe_part(path, folder), "base": str(bases[domain].folder)}
            for (path, domain), folder in folders.items()
        )
        _run_scorer([*parts], [*folders.values()], settings)
        for at in folders:
            store.commit(STAGE, keys[at], {"chunks": bases[at[1]].chunks})
        progress.report_progress((done + 1) / max(len({p for p, _ in missing}), 1))

    def load(path: Path, domain: str) -> TokenScores:
        key = keys.get((path, domain))
        return _load(bases[domain], store.find(STAGE, key)) if key else _load_base(bases[domain])

    return tuple(
        Evaluation(path, sizes[path], {domain: load(path, domain) for domain in texts})
        for path in digests
    )


def _split_batches(
    missing: Sequence[FileAndDomain], sizes: Mapping[Path, int]
) -> Iterator[list[FileAndDomain]]:
    """Yield what one process reads: a large file, or a run of small ones.

    A small file loads faster than a Python process starts.
    """
    yield from (
        [*run]
        # All domains of a large file are one batch, so that it is loaded once. `missing` is in the
        # order of the files.
        for _, run in groupby(missing, lambda at: at[0] if sizes[at[0]] >= SMALL_BYTES else None)
    )


@dataclass(frozen=True)
class _BaseScores:
    """The base's log-probabilities of one text, in the store."""

    folder: Path
    inputs: Mapping[str, Any]
    chunks: int


def _score_base(
    base: ModelFile, texts: Mapping[str, Path], store: Store, settings: EvaluationSettings
) -> dict[str, _BaseScores]:
    """Return the base's scores of each text, from the store or read now."""
    # Threads change no bit: each row of a matrix product is one thread's work.
    shared = {k: v for k, v in asdict(settings).items() if k != "threads"} | {
        "llama.cpp": bindings_version()
    }
    keys = {
        domain: {"base": base.digest, "text": files.hash_file(text), **shared}
        for domain, text in texts.items()
    }
    folders = {
        domain: store.begin(BASE_STAGE, key)
        for domain, key in keys.items()
        if not store.find(BASE_STAGE, key)
    }
    parts = (
        {**_describe_part(base.path, folder), "text": str(texts[domain].resolve())}
        for domain, folder in folders.items()
    )
    _run_scorer([*parts], [*folders.values()], settings)
    for domain, folder in folders.items():
        # Committed even if the text turns out to be too short below: the next run then says so
        # without reading it again.
        store.commit(BASE_STAGE, keys[domain], json.loads((folder / ABOUT).read_text()))
    scores: dict[str, _BaseScores] = {}
    for domain, key in keys.items():
        done = store.find(BASE_STAGE, key)
        assert done
        scores[domain] = _BaseScores(done.folder, key, done.facts["chunks"])
    raise_problems(
        _describe_short(texts[domain], s.chunks, settings)
        for domain, s in scores.items()
        if s.chunks < FEWEST_CHUNKS
    )
    return scores


def _run_scorer(
    parts: Sequence[Mapping[str, str]], folders: Sequence[Path], settings: EvaluationSettings
) -> None:
    """Run the scorer on these parts of work, each of which fills its folder."""
    if not parts:
        return
    folder = folders[0]  # any of them: it has to be on the store's disk, and to go with it
    child.run_child(
        "quant.evaluate.scorer",
        {**asdict(settings), "parts": parts},
        folder=folder,
        name="the scorer",
        env=_environment(),
    )
    files.remove(folder / child.LOG)  # has times, which differ between two runs


def _environment() -> dict[str, str]:
    # numpy's BLAS threads would compete with llama.cpp's. On an abort, ggml would start gdb.
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}


def _describe_part(model: Path, folder: Path) -> dict[str, str]:
    return {"model": str(model.resolve()), "folder": str(folder)}


def _load_base(base: _BaseScores) -> TokenScores:
    """Return the base against itself, which needs no second reading."""
    nll = np.load(base.folder / "base_nll.npy")
    if not np.isfinite(nll).all():
        raise CheckError(
            f"{base.folder}: expected finite log-probabilities of the base, found NaN or infinity:"
            " nothing can be compared with it"
        )
    return TokenScores(np.zeros_like(nll), nll, nll, np.ones(nll.shape, bool))


def _load(base: _BaseScores, done: StoredResult | None) -> TokenScores:
    assert done
    kld, nll, same = (np.load(done.path(f"{name}.npy")) for name in ("kld", "nll", "same_top"))
    if not (np.isfinite(kld).all() and np.isfinite(nll).all()):
        raise CheckError(
            f"{done.folder}: expected finite divergences, found NaN or infinity: the file's"
            " probabilities are unusable"
        )
    return TokenScores(kld, nll, np.load(base.folder / "base_nll.npy"), same)


def _find_foreign(base: ModelFile, models: Sequence[ModelFile]) -> Iterator[str]:
    """Yield a line for each file whose tensors are not the base's, as far as the headers show."""
    # Types differ by design. Another fine-tune of the model passes: headers do not show it.
    expected = {t.name: t.elements for t in base.tensors}
    for model in models:
        actual = {t.name: t.elements for t in model.tensors}
        names = expected.keys() | actual.keys()
        if wrong := sorted(n for n in names if expected.get(n) != actual.get(n)):
            yield (
                f"{model.path}: of another model than {base.path}: {len(wrong)} tensors differ,"
                f" first {wrong[0]}"
            )


def _describe_short(text: Path, chunks: int, settings: EvaluationSettings) -> str:
    # In proportion to what it has, rounded up.
    needed = -(-text.stat().st_size * FEWEST_CHUNKS // max(chunks, 1))
    return (
        f"{text}: expected at least {FEWEST_CHUNKS} chunks of {settings.context} tokens, found"
        f" {chunks}: too few for an interval; a text of {needed:,} bytes would do"
    )
