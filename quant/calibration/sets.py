"""Calibration sets as TOML: which sources, how much of each, under which licence.

A set is a name of ``calibration/sets/NAME.toml`` or a path to such a file; a folder of ``.jsonl`` files, or one of them, is
a set too, of which everything is taken. Paths in a set are relative to its file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quant.calibration.documents import SETS, set_files
from quant.core.toml import Strict, read_toml
from quant.errors import InputError, raise_problems, suggest_name
from quant.hub.client import REPO
from quant.plan.recipe import NAME

SHARE_ERROR = 1e-6
Form = Literal["documents", "messages", "sharegpt", "pairs", "tree", "text"]


@dataclass(frozen=True)
class CalibrationSource(Strict):
    """One source of a set: files beside it, or a dataset of the hub."""

    name: str
    kind: str
    """What it teaches: conversation, coding, tools ...; held-out texts are told apart by it."""
    licence: str
    form: Form = "documents"
    """How a row becomes a document: see :mod:`quant.calibration.forms`."""
    attribution: str = ""
    """Whom to name, where the licence wants that."""
    path: str | None = None
    """Files beside the set; may hold ``*``."""
    repo: str | None = None
    """A dataset of the hub."""
    revision: str = "main"
    """What a lock resolves to a commit."""
    files: tuple[str, ...] = ()
    """Of the repo; may hold ``*``."""
    most_files: int | None = None
    """Only the first of them, by name."""
    rows: int | None = None
    """At most so many rows that make a document are looked at."""
    share: float | None = None
    """Of the set's tokens."""
    language: str = "en"
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the form's columns are called here, where it is another name."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows whose column has one of these values."""
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows whose column has none of these values."""


@dataclass(frozen=True)
class CalibrationSet(Strict):
    """calibration/sets/NAME.toml."""

    name: str
    summary: str
    source: tuple[CalibrationSource, ...]
    tokens: int | None = None
    """How much to draw in all, as the model counts; everything when not given."""
    held_out: float = 0.1
    """The share of the documents that never enters the importance matrix: evaluation reads them."""
    seed: int = 0
    """Decides which documents are held out, and the order of all."""


def find_set(name: str) -> tuple[CalibrationSet, Path]:
    """A set by its name or a path, and the folder where its paths begin. Raises InputError with everything wrong."""
    known = sorted(
        {p.stem for p in SETS.glob("*.toml")} | {p.name for p in SETS.iterdir() if p.is_dir()}
    )
    path = Path(name)
    if (SETS / f"{name}.toml").is_file():
        path = SETS / f"{name}.toml"
    if path.suffix == ".toml":
        told = read_toml(path, CalibrationSet)
        raise_problems(_problems(told, path))
        return told, path.parent
    if path.exists() or name in known:
        files = set_files(name)
        sources = tuple(CalibrationSource(p.stem, p.stem, "not told", path=p.name) for p in files)
        return CalibrationSet(path.stem, "Files of a folder.", sources), files[0].parent
    raise InputError(f"calibration set {name!r} is not known: {suggest_name(name, known)}")


def _problems(told: CalibrationSet, path: Path) -> Iterator[str]:
    if not NAME.fullmatch(told.name):
        yield f"{path}: name: expected letters, digits, '.', '_' and '-', found {told.name!r}"
    if not told.source:
        yield f"{path}: source: expected at least one, found none"
    if not 0 <= told.held_out <= 0.5:
        yield f"{path}: held_out: expected a share from 0 to 0.5, found {told.held_out}"
    if told.tokens is not None and told.tokens < 1:
        yield f"{path}: tokens: expected at least 1, found {told.tokens}"
    names = [s.name for s in told.source]
    yield from (
        f"{path}: source {n!r}: expected once, found twice"
        for n in sorted({n for n in names if names.count(n) > 1})
    )
    shares = [s.share for s in told.source if s.share is not None]
    if told.tokens is not None and abs(sum(shares) - 1) > SHARE_ERROR:
        yield f"{path}: share: expected shares that add up to 1, as the set says tokens, found {sum(shares):g}"
    if told.tokens is None and shares:
        yield f"{path}: tokens: missing; shares are of that number"
    for n, source in enumerate(told.source):
        yield from _source_problems(source, f"{path}: source[{n}]")


def _source_problems(source: CalibrationSource, where: str) -> Iterator[str]:
    if not NAME.fullmatch(source.name):
        yield f"{where}.name: expected letters, digits, '.', '_' and '-', found {source.name!r}"
    if (source.path is None) == (source.repo is None):
        yield f"{where}: expected one of path and repo, found {'both' if source.repo else 'neither'}"
    if source.repo is not None and not REPO.fullmatch(source.repo):
        yield f"{where}.repo: expected OWNER/NAME, found {source.repo!r}"
    if source.repo is not None and not source.files:
        yield f"{where}.files: expected the files of the repo to read, found none"
    if source.share is not None and not 0 < source.share <= 1:
        yield f"{where}.share: expected a share up to 1, found {source.share:g}"
    for key, value in (("rows", source.rows), ("most_files", source.most_files)):
        if value is not None and value < 1:
            yield f"{where}.{key}: expected at least 1, found {value}"
