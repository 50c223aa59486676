"""Measure how far quantised files are from their base: perplexity, KLD and top-1 agreement, by domain, with intervals.

The base is read once for each text and kept; files are compared with it token by token, on the same tokens, with the
same batch, threads and build, so a file that is the base has a divergence of nothing. Intervals are drawn from chunks:
tokens of one chunk are no independent news.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant.core import files, process, progress
from quant.core.format import to_canonical_json
from quant.core.store import Store, StoredResult
from quant.errors import CheckError, InputError, raise_problems
from quant.evaluate.scorer import ABOUT
from quant.llama.gguf import list_shards, read_headers
from quant.llama.model import bindings_version
from quant.plan.recipe import FEWEST_CHUNKS

STAGE, BASE_STAGE = "evaluate", "evaluate-base"
RESAMPLES = 1000
SEED = 7
LEVEL = 0.95
"""Of the intervals."""
JOB = "job.json"
SMALL_BYTES = 10**8
"""Smaller files are read by one process, one after the other."""
At: TypeAlias = tuple[Path, str]
"""A file, and the domain that it reads."""
PARTS = ("kld", "nll", "same_top")


@dataclass(frozen=True)
class EvaluationSettings:
    """How texts are read; all files that are compared are read alike."""

    context: int = 512
    chunks: int | None = None
    """Of each text at most; all when not given."""
    threads: int = 2
    top: int = 4096
    """Words that the base keeps for each token; all others count as one, which can only hide divergence: on a text with a
    perplexity of 65 a quarter of tiny-glm's words told 90 % of it, half of them more."""


@dataclass(frozen=True)
class Figure:
    """A number and the interval that it lies in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Reading:
    """How far one file is from its base on one text, for every token that was predicted: a row a chunk."""

    kld: NDArray[np.float32]
    """Kullback-Leibler divergence from the base, in nats."""
    nll: NDArray[np.float32]
    """What the file lost on the word that came, in nats."""
    base_nll: NDArray[np.float32]
    same_top: NDArray[np.bool_]
    """Whether both hold the same word for the likeliest."""


@dataclass(frozen=True)
class Evaluation:
    """One file on the texts of one or several domains."""

    file: Path
    bytes: int
    readings: Mapping[str, Reading]
    """By domain."""

    @cached_property
    def whole(self) -> Reading:
        """All domains as one."""
        parts = list(self.readings.values())
        return Reading(
            *(
                np.concatenate([getattr(r, n) for r in parts])
                for n in ("kld", "nll", "base_nll", "same_top")
            )
        )

    def figures(self) -> dict[str, Any]:
        """Of the whole, and of every domain."""
        return compute_figures(self.whole) | {
            "domains": {name: compute_figures(r) for name, r in self.readings.items()}
        }

    def json(self) -> dict[str, Any]:
        """For people and programs."""
        return {"file": self.file.name, "bytes": self.bytes, **self.figures()}


def evaluate_files(
    base: Path,
    paths: Sequence[Path],
    texts: Mapping[str, Path],
    store: Store,
    settings: EvaluationSettings | None = None,
) -> tuple[Evaluation, ...]:
    """Every file against its base on every text; what was measured before is not measured again.

    Files are named by their first shard. Raises InputError for texts that are too short and for files of another model.
    """
    raise_problems(_problems(base, paths))
    digests = {p: _digest(p) for p in paths}
    return measure_files(
        base,
        digests.get(base) or _digest(base),
        digests,
        texts,
        store,
        settings or EvaluationSettings(),
    )


def measure_files(
    base: Path,
    base_digest: str,
    digests: Mapping[Path, str],
    texts: Mapping[str, Path],
    store: Store,
    settings: EvaluationSettings,
) -> tuple[Evaluation, ...]:
    """The same for files whose digests are known, in their order."""
    bases = _bases(base, base_digest, texts, store, settings)
    keys = {
        (p, name): {**about.inputs, "file": digest}
        for p, digest in digests.items()
        if digest != base_digest
        for name, about in bases.items()
    }
    sizes = {p: sum(part.stat().st_size for part in list_shards(p)) for p in digests}
    missing = [at for at, key in keys.items() if not store.find(STAGE, key)]
    for done, part in enumerate(_batches(missing, sizes)):
        todo = {at: store.begin(STAGE, keys[at]) for at in part}
        jobs = (
            {**_told(p, folder), "base": str(bases[name].folder)}
            for (p, name), folder in todo.items()
        )
        _score([*jobs], [*todo.values()], settings)
        for at in todo:
            store.commit(STAGE, keys[at], {"chunks": bases[at[1]].chunks})
        progress.report_progress((done + 1) / max(len({p for p, _ in missing}), 1))

    def reading(path: Path, name: str) -> Reading:
        key = keys.get((path, name))
        return _reading(bases[name], store.find(STAGE, key)) if key else _same(bases[name])

    return tuple(
        Evaluation(p, sizes[p], {name: reading(p, name) for name in texts}) for p in digests
    )


def read_texts(
    base: Path,
    base_digest: str,
    paths: Mapping[Path, str],
    text: Path,
    store: Store,
    settings: EvaluationSettings,
) -> dict[Path, Reading]:
    """Files, each with its digest, against their base on one text. Raises as :func:`evaluate`."""
    return {
        e.file: e.whole
        for e in measure_files(base, base_digest, paths, {"text": text}, store, settings)
    }


def compute_figures(reading: Reading) -> dict[str, Any]:
    """What is told of a reading; intervals are of 95 %."""
    kld, mean = reading.kld, bootstrap_interval(reading.kld)
    return {
        "chunks": len(kld),
        "ppl": perplexity(reading),
        "ppl_base": float(np.exp(reading.base_nll.mean(dtype=np.float64))),
        "kld_mean": mean.value,
        "kld_mean_low": mean.low,
        "kld_mean_high": mean.high,
        "kld_median": float(np.median(kld)),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "kld_p999": float(np.quantile(kld, 0.999)),
        "kld_max": float(kld.max()),
        "top1": float(reading.same_top.mean()),
    }


def perplexity(reading: Reading) -> float:
    """How many words the file wavers between, on average."""
    return float(np.exp(reading.nll.mean(dtype=np.float64)))


def bootstrap_interval(values: NDArray[Any]) -> Figure:
    """The mean, and where it would lie had other chunks been read."""
    return Figure(
        float(values.mean(dtype=np.float64)), *_ends(_resampled(values.mean(1, dtype=np.float64)))
    )


def difference(first: Reading, second: Reading) -> Figure:
    """Mean KLD of the second less that of the first, on the same chunks. Raises InputError when these are others."""
    if not np.array_equal(first.base_nll, second.base_nll):
        raise InputError(
            "two files can only be compared on the same text of the same base, found others"
        )
    gaps = second.kld.mean(1, dtype=np.float64) - first.kld.mean(1, dtype=np.float64)
    return Figure(float(gaps.mean()), *_ends(_resampled(gaps)))


def _batches(missing: Sequence[At], sizes: Mapping[Path, int]) -> Iterator[list[At]]:
    """What one process reads: a large file, or small ones, of which the starts would take longest."""
    yield from (
        [*run]
        for _, run in groupby(missing, lambda at: at[0] if sizes[at[0]] >= SMALL_BYTES else None)
    )


@dataclass(frozen=True)
class _Base:
    """What a base says to one text."""

    folder: Path
    inputs: Mapping[str, Any]
    chunks: int


def _bases(
    base: Path, digest: str, texts: Mapping[str, Path], store: Store, settings: EvaluationSettings
) -> dict[str, _Base]:
    """What the base says to each text, read now or found."""
    # Threads change no bit of what is read: each row of a product is one thread's work.
    shared = {k: v for k, v in asdict(settings).items() if k != "threads"} | {
        "llama.cpp": bindings_version()
    }
    keys = {
        name: {"base": digest, "text": files.hash_file(text), **shared}
        for name, text in texts.items()
    }
    todo = {
        name: store.begin(BASE_STAGE, key)
        for name, key in keys.items()
        if not store.find(BASE_STAGE, key)
    }
    parts = (
        {**_told(base, folder), "text": str(texts[name].resolve())} for name, folder in todo.items()
    )
    _score([*parts], [*todo.values()], settings)
    for name, folder in todo.items():
        store.commit(BASE_STAGE, keys[name], json.loads((folder / ABOUT).read_text()))
    found: dict[str, _Base] = {}
    for name, key in keys.items():
        done = store.find(BASE_STAGE, key)
        assert done
        found[name] = _Base(done.folder, key, done.facts["chunks"])
    raise_problems(
        _too_short(texts[name], b.chunks, settings)
        for name, b in found.items()
        if b.chunks < FEWEST_CHUNKS
    )
    return found


def _score(
    parts: Sequence[Mapping[str, str]], folders: Sequence[Path], settings: EvaluationSettings
) -> None:
    """Let the scorer do these parts of work, each in its folder."""
    if not parts:
        return
    folder = folders[0]
    files.write_text(folder / JOB, json.dumps({**asdict(settings), "parts": parts}) + "\n")
    command: list[str | Path] = [sys.executable, "-m", "quant.evaluate.scorer", folder / JOB]
    try:
        process.run_program(
            command, cwd=folder, log=folder / "log", env=_environment(), name="reading the text"
        )
    finally:
        files.remove(folder / JOB)
    files.remove(folder / "log")  # it tells times


def _environment() -> dict[str, str]:
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}


def _told(model: Path, folder: Path) -> dict[str, str]:
    return {"model": str(model.resolve()), "folder": str(folder)}


def _same(base: _Base) -> Reading:
    """Of a base from itself: nothing, which needs no reading."""
    nll = np.load(base.folder / "base_nll.npy")
    if not np.isfinite(nll).all():
        raise CheckError(
            f"{base.folder}: what the base says is NaN or infinite: nothing can be measured by it"
        )
    return Reading(np.zeros_like(nll), nll, nll, np.ones(nll.shape, bool))


def _reading(base: _Base, done: StoredResult | None) -> Reading:
    assert done
    kld, nll, same = (np.load(done.path(f"{name}.npy")) for name in PARTS)
    if not (np.isfinite(kld).all() and np.isfinite(nll).all()):
        raise CheckError(
            f"{done.folder}: divergences that are NaN or infinite: the file says nothing that can be used"
        )
    return Reading(kld, nll, np.load(base.folder / "base_nll.npy"), same)


def _problems(base: Path, paths: Sequence[Path]) -> Iterator[str]:
    """Why files cannot be compared with a base, as far as their heads tell."""
    expected = {t.name: t.elements for h in read_headers(base) for t in h.tensors}
    for path in paths:
        found = {t.name: t.elements for h in read_headers(path) for t in h.tensors}
        if wrong := sorted(
            n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)
        ):
            yield f"{path}: of another model than {base}: {len(wrong)} tensors differ, first {wrong[0]}"


def _too_short(text: Path, chunks: int, settings: EvaluationSettings) -> str:
    more = -(-text.stat().st_size * FEWEST_CHUNKS // max(chunks, 1))
    return (
        f"{text}: expected at least {FEWEST_CHUNKS} chunks of {settings.context} tokens, found {chunks}: too few to"
        f" mean anything; a text of {more:,} bytes would do"
    )


def _resampled(chunks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of as many chunks, drawn with return; always the same draws."""
    drawn = np.random.default_rng(SEED).integers(0, len(chunks), (RESAMPLES, len(chunks)))
    means: NDArray[np.float64] = chunks[drawn].mean(1)
    return means


def _ends(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _digest(first: Path) -> str:
    paths = list_shards(first)
    return (
        files.hash_file(first)
        if len(paths) == 1
        else to_canonical_json([files.hash_file(p) for p in paths])
    )
