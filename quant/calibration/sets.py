"""Calibration sets as TOML: which sources, how much of each, under which license.

A set is given by the name of ``calibration/sets/NAME.toml`` or by a path to such a file. A folder
of ``.jsonl`` files, or one such file, is a set too: everything in it is used. Paths in a set are
relative to its file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from quant.calibration.documents import SETS, list_set_files
from quant.core.errors import InputError, raise_problems, suggest_name
from quant.core.toml import Strict, read_toml
from quant.hub.client import REPO
from quant.plan.recipe import NAME

SHARE_TOLERANCE = 1e-6
"""By how much the shares of a set may miss 1: decimal fractions do not add up exactly."""
Form = Literal["documents", "messages", "sharegpt", "pairs", "tree", "text"]


@dataclass(frozen=True)
class CalibrationSource(Strict):
    """One source of a set: files beside it, or a dataset of the hub."""

    name: str
    kind: str
    """Domain: conversation, coding, tools, ... Held-out texts are grouped by it."""
    # Sets that people wrote before have the British spelling, so it is still read.
    license: Annotated[str, Field(validation_alias=AliasChoices("license", "licence"))]
    form: Form = "documents"
    """How a row becomes a document: see :mod:`quant.calibration.forms`."""
    attribution: str = ""
    """Whom to name, if the license requires it."""
    path: str | None = None
    """Files beside the set; may contain ``*``."""
    repo: str | None = None
    """A dataset of the hub, OWNER/NAME."""
    revision: str = "main"
    """Branch, tag or commit that ``quant calibration lock`` resolves to a commit."""
    files: tuple[str, ...] = ()
    """Files of the repo; may contain ``*``."""
    most_files: int | None = None
    """Maximum number of files, by name. None reads all."""
    rows: int | None = None
    """Maximum number of documents that are taken from the source. None takes all."""
    share: float | None = None
    """Fraction of the set's tokens."""
    language: str = "en"
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column names of the dataset, by the name that the form uses."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Take a row only if the column has one of these values."""
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Skip a row if the column has one of these values."""


@dataclass(frozen=True)
class CalibrationSet(Strict):
    """calibration/sets/NAME.toml."""

    name: str
    summary: str
    source: tuple[CalibrationSource, ...]
    tokens: int | None = None
    """Tokens to draw in all, by the model's vocabulary. None takes every document."""
    held_out: float = 0.1
    """Fraction of the documents that no importance matrix sees. Evaluation uses them."""
    seed: int = 0
    """Decides which documents are held out, and the order of all."""


def find_set(name: str) -> tuple[CalibrationSet, Path]:
    """Find a calibration set.

    Args:
        name: Name of a shipped set, or a path to a TOML file, a folder or a ``.jsonl`` file.

    Returns:
        The set, and the folder that its paths are relative to.

    Raises:
        InputError: There is no such set, or it is broken. Every problem is listed.
    """
    known = sorted(
        {p.stem for p in SETS.glob("*.toml")} | {p.name for p in SETS.iterdir() if p.is_dir()}
    )
    path = Path(name)
    # A shipped name comes before a path: a recipe means the same set in every working folder.
    if (SETS / f"{name}.toml").is_file():
        path = SETS / f"{name}.toml"
    if path.suffix == ".toml":
        calibration_set = read_toml(path, CalibrationSet)
        raise_problems(_find_set_problems(calibration_set, path))
        return calibration_set, path.parent
    if path.exists() or name in known:
        files = list_set_files(name)
        # "not told" goes into the digest of the calibration text, so the wording has to stay.
        sources = tuple(CalibrationSource(p.stem, p.stem, "not told", path=p.name) for p in files)
        return CalibrationSet(path.stem, "Files of a folder.", sources), files[0].parent
    raise InputError(f"calibration set {name!r} is not known: {suggest_name(name, known)}")


def _find_set_problems(calibration_set: CalibrationSet, path: Path) -> Iterator[str]:
    if not NAME.fullmatch(calibration_set.name):
        yield (
            f"{path}: name: expected letters, digits, '.', '_' and '-', found"
            f" {calibration_set.name!r}"
        )
    if not calibration_set.source:
        yield f"{path}: source: expected at least one, found none"
    if not 0 <= calibration_set.held_out <= 0.5:
        yield (
            f"{path}: held_out: expected a fraction from 0 to 0.5, found {calibration_set.held_out}"
        )
    tokens = calibration_set.tokens
    if tokens is not None and tokens < 1:
        yield f"{path}: tokens: expected at least 1, found {tokens}"
    names = [s.name for s in calibration_set.source]
    yield from (
        f"{path}: source {n!r}: expected once, found twice"
        for n in sorted({n for n in names if names.count(n) > 1})
    )
    shares = [s.share for s in calibration_set.source if s.share is not None]
    if tokens is not None and abs(sum(shares) - 1) > SHARE_TOLERANCE:
        yield (
            f"{path}: share: expected shares that add up to 1, because the set has tokens, found"
            f" {sum(shares):g}"
        )
    if tokens is None and shares:
        yield f"{path}: tokens: missing; shares are fractions of that number"
    for n, source in enumerate(calibration_set.source):
        yield from _find_source_problems(source, f"{path}: source[{n}]")


def _find_source_problems(source: CalibrationSource, where: str) -> Iterator[str]:
    if not NAME.fullmatch(source.name):
        yield f"{where}.name: expected letters, digits, '.', '_' and '-', found {source.name!r}"
    if (source.path is None) == (source.repo is None):
        given = "both" if source.repo else "neither"
        yield f"{where}: expected one of path and repo, found {given}"
    if source.repo is not None and not REPO.fullmatch(source.repo):
        yield f"{where}.repo: expected OWNER/NAME, found {source.repo!r}"
    if source.repo is not None and not source.files:
        yield f"{where}.files: expected the files of the repo to read, found none"
    if source.share is not None and not 0 < source.share <= 1:
        yield f"{where}.share: expected a fraction up to 1, found {source.share:g}"
    for key, value in (("rows", source.rows), ("most_files", source.most_files)):
        if value is not None and value < 1:
            yield f"{where}.{key}: expected at least 1, found {value}"
