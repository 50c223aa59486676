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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant import files, toolchain
from quant.errors import CheckFailed, InputError, refuse
from quant.header import read_headers, shard_paths
from quant.store import Done, Store

STAGE, BASE_STAGE = "evaluate", "evaluate-base"
RESAMPLES = 1000
SEED = 7
LEVEL = 0.95
"""Of the intervals."""
FEWEST_CHUNKS = 4
"""With fewer, an interval says nothing."""
PARTS = ("kld", "nll", "same_top")


@dataclass(frozen=True)
class Settings:
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
            *(np.concatenate([getattr(r, n) for r in parts]) for n in ("kld", "nll", "base_nll", "same_top"))
        )

    def json(self) -> dict[str, Any]:
        """For people and programs: the whole, and every domain."""
        domains = {name: figures(reading) for name, reading in self.readings.items()}
        return {"file": self.file.name, "bytes": self.bytes, **figures(self.whole), "domains": domains}


def evaluate(
    base: Path, paths: Sequence[Path], texts: Mapping[str, Path], store: Store, settings: Settings | None = None
) -> tuple[Evaluation, ...]:
    """Every file against its base on every text; what was measured before is not measured again.

    Files are named by their first shard. Raises InputError for texts that are too short and for files of another model.
    """
    settings = settings or Settings()
    refuse(_problems(base, paths))
    digest, digests = _digest(base), {p: _digest(p) for p in paths}
    found = {name: read(base, digest, digests, text, store, settings) for name, text in texts.items()}
    sizes = {p: sum(part.stat().st_size for part in shard_paths(p)) for p in paths}
    return tuple(Evaluation(p, sizes[p], {name: by_file[p] for name, by_file in found.items()}) for p in paths)


def read(
    base: Path, base_digest: str, paths: Mapping[Path, str], text: Path, store: Store, settings: Settings
) -> dict[Path, Reading]:
    """Files, each with its digest, against their base on one text. Raises as :func:`evaluate`."""
    shared = {
        "base": base_digest, "text": files.digest(text), **asdict(settings), "llama.cpp": scorer_version(),
    }  # fmt: skip
    about = store.once(BASE_STAGE, shared, lambda partial: _kept(base, text, partial, settings))
    if (count := about.facts["chunks"]) < FEWEST_CHUNKS:
        raise InputError(
            f"{text}: expected at least {FEWEST_CHUNKS} chunks of {settings.context} tokens, found {count}: too few to"
            f" mean anything; a text of {_more(text, count)} would do"
        )
    keys = {p: {**shared, "file": digest} for p, digest in paths.items()}
    todo = {p: store.begin(STAGE, key) for p, key in keys.items() if not store.find(STAGE, key)}
    if todo:
        job = {"base": str(about.folder), "words": about.facts["words"], "compare": _told(todo)}
        folder = next(iter(todo.values()))
        _score(folder, settings, job)
        for p in todo:
            store.settle(STAGE, keys[p], {"chunks": count})
    return {p: _reading(about, store.find(STAGE, key)) for p, key in keys.items()}


def figures(reading: Reading) -> dict[str, Any]:
    """What is told of a reading; intervals are of 95 %."""
    kld, mean = reading.kld, interval(reading.kld)
    return {
        "chunks": len(kld),
        "ppl": float(np.exp(reading.nll.mean(dtype=np.float64))),
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


def interval(values: NDArray[Any]) -> Figure:
    """The mean, and where it would lie had other chunks been read."""
    return Figure(float(values.mean(dtype=np.float64)), *_ends(_resampled(values.mean(1, dtype=np.float64))))


def difference(first: Reading, second: Reading) -> Figure:
    """Mean KLD of the second less that of the first, on the same chunks. Raises InputError when these are others."""
    if not np.array_equal(first.base_nll, second.base_nll):
        raise InputError("two files can only be compared on the same text of the same base, found others")
    gaps = second.kld.mean(1, dtype=np.float64) - first.kld.mean(1, dtype=np.float64)
    return Figure(float(gaps.mean()), *_ends(_resampled(gaps)))


def scorer_version() -> str:
    """The llama.cpp that reads the texts: that of the lock file, whichever tools are named."""
    return str(toolchain.Toolchain(Path(sys.prefix) / "bin").version)


def _kept(base: Path, text: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    _score(folder, settings, {"text": str(text.resolve()), "keep": _told({base: folder})})
    about: dict[str, Any] = json.loads((folder / "about.json").read_text())
    return about


def _score(folder: Path, settings: Settings, job: Mapping[str, Any]) -> None:
    files.write_text(folder / "job.json", json.dumps({**asdict(settings), **job}) + "\n")
    command: list[str | Path] = [sys.executable, "-m", "quant.scorer", folder / "job.json"]
    try:
        toolchain.run(command, cwd=folder, log=folder / "log", env=_environment(), name="reading the text")
    finally:
        files.remove(folder / "job.json")


def _environment() -> dict[str, str]:
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}


def _told(todo: Mapping[Path, Path]) -> list[dict[str, str]]:
    return [{"model": str(p.resolve()), "folder": str(folder)} for p, folder in todo.items()]


def _reading(about: Done, done: Done | None) -> Reading:
    assert done
    kld, nll, same = (np.load(done.path(f"{name}.npy")) for name in PARTS)
    if not (np.isfinite(kld).all() and np.isfinite(nll).all()):
        raise CheckFailed(
            f"{done.folder}: divergences that are NaN or infinite: the file says nothing that can be used"
        )
    return Reading(kld, nll, np.load(about.path("base_nll.npy")), same)


def _problems(base: Path, paths: Sequence[Path]) -> Iterator[str]:
    """Why files cannot be compared with a base, as far as their heads tell."""
    expected = {t.name: t.elements for h in read_headers(base) for t in h.tensors}
    for path in paths:
        found = {t.name: t.elements for h in read_headers(path) for t in h.tensors}
        if wrong := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
            yield f"{path}: of another model than {base}: {len(wrong)} tensors differ, first {wrong[0]}"


def _more(text: Path, chunks: int) -> str:
    size = text.stat().st_size
    return f"{-(-size * FEWEST_CHUNKS // max(chunks, 1)):,} bytes"


def _resampled(chunks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of as many chunks, drawn with return; always the same draws."""
    drawn = np.random.default_rng(SEED).integers(0, len(chunks), (RESAMPLES, len(chunks)))
    means: NDArray[np.float64] = chunks[drawn].mean(1)
    return means


def _ends(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _digest(first: Path) -> str:
    paths = shard_paths(first)
    return files.digest(first) if len(paths) == 1 else files.canonical([files.digest(p) for p in paths])
