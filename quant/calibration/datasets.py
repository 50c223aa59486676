"""Find the files of a set's sources, and lock the datasets that come from the hub.

A lock is JSON beside the set, ``NAME.lock.json``. For each dataset it has the commit, the digest of
every file, the number of documents, their digest, and the rows that were left out. A calibration
text is made from exactly what was locked, or not at all.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from quant.calibration import forms
from quant.calibration.documents import Document, read_document_file
from quant.calibration.rows import read_rows
from quant.calibration.sets import CalibrationSet, CalibrationSource
from quant.core import files
from quant.core.errors import CheckError, InputError, raise_problems
from quant.core.files import Receipt
from quant.core.format import hash_texts, to_canonical_json, to_pretty_json
from quant.hub import client as hub_client
from quant.hub.client import COMMIT


@dataclass(frozen=True)
class LockedSource:
    """One dataset of the hub, pinned to a commit."""

    repo: str
    revision: str
    files: tuple[Receipt, ...]
    rows: int
    """Number of documents."""
    sha256: str
    """Digest of the documents."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of rows that make no document, by the reason."""


DatasetLock = Mapping[str, LockedSource]
"""By name of the source."""


def lock_datasets(calibration_set: CalibrationSet, folder: Path) -> DatasetLock:
    """Resolve the datasets of a set to commits, download their files, and write the lock.

    Args:
        calibration_set: The set.
        folder: Its folder; the lock is written there.

    Raises:
        InputError: The hub does not have a dataset or its files; or more than half of a source's
            rows make no document, so they have another form than the set expects.
    """
    sources = [s for s in calibration_set.source if s.repo]
    if not sources:
        raise InputError(
            f"calibration set {calibration_set.name}: expected a dataset of the hub to lock, found"
            " only files beside it"
        )
    lock = {source.name: _lock_source(source) for source in sources}
    text = to_pretty_json({name: asdict(pin) for name, pin in lock.items()})
    files.write_text(dataset_lock_path(calibration_set, folder), text)
    return lock


def dataset_lock_path(calibration_set: CalibrationSet, folder: Path) -> Path:
    """Return the path of a set's lock."""
    return folder / f"{calibration_set.name}.lock.json"


def read_dataset_lock(calibration_set: CalibrationSet, folder: Path) -> DatasetLock:
    """Read the lock of a set; it is empty for a set without datasets of the hub.

    Raises:
        InputError: The lock is missing or broken, or does not have a dataset of the set.
    """
    path = dataset_lock_path(calibration_set, folder)
    sources = [s for s in calibration_set.source if s.repo]
    if not sources:
        return {}
    advice = f"run `quant calibration lock {calibration_set.name}`"
    if not path.exists():
        names = ", ".join(s.name for s in sources)
        raise InputError(
            f"{path}: missing; {names} are datasets of the hub, which are read from a lock only:"
            f" {advice}"
        )
    try:
        lock = {
            name: LockedSource(**{**pin, "files": tuple(Receipt(**f) for f in pin["files"])})
            for name, pin in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: expected a lock, found something else ({e!r}); {advice}") from e
    raise_problems(
        f"{path}: {s.name}: expected a commit of {s.repo}, found"
        f" {lock[s.name].repo if s.name in lock else 'nothing'}; {advice}"
        for s in sources
        if s.name not in lock
        or lock[s.name].repo != s.repo
        or not COMMIT.fullmatch(lock[s.name].revision)
    )
    return lock


def describe_set_inputs(
    calibration_set: CalibrationSet, folder: Path, lock: DatasetLock
) -> dict[str, Any]:
    """Return everything that decides a set's documents, as plain JSON.

    The calibration text is stored under the digest of this.
    """
    local = {
        s.name: [asdict(files.make_receipt(p, folder)) for p in list_local_files(s, folder)]
        for s in calibration_set.source
        if s.path
    }
    settings = asdict(calibration_set)
    for source in settings["source"]:
        # The key had the British spelling when the first digests were made; they must not change.
        source["licence"] = source.pop("license")
    locked = {name: asdict(pin) for name, pin in lock.items()}
    return {"set": settings, "files": local, "locked": locked}


def list_local_files(source: CalibrationSource, folder: Path) -> list[Path]:
    """Return the files of a source beside its set. Raise InputError if there are none."""
    # The order in a folder depends on the file system. Here it decides which files are used.
    paths = sorted(folder.glob(str(source.path)))[: source.most_files]
    if not paths:
        raise InputError(
            f"{folder / str(source.path)}: source {source.name}: expected files, found none"
        )
    return paths


def read_documents(
    calibration_set: CalibrationSet, folder: Path, lock: DatasetLock
) -> tuple[Document, ...]:
    """Read the documents of every source, in the order of the sources.

    Args:
        calibration_set: The set.
        folder: The folder that its paths are relative to.
        lock: From :func:`read_dataset_lock`.

    Raises:
        InputError: A file or row is broken, or a source has no documents.
        CheckError: A dataset has other content than was locked.
    """
    documents: list[Document] = []
    for source in calibration_set.source:
        if source.repo is None:
            part = tuple(_read_source(source, list_local_files(source, folder)))
        else:
            part = _read_locked(source, lock[source.name])
        if not part:
            raise InputError(
                f"calibration set {calibration_set.name}: source {source.name}: expected documents,"
                " found none"
            )
        documents += part
    return tuple(documents)


def hash_documents(documents: Sequence[Document]) -> str:
    """Return one digest for documents in their order."""
    return hash_texts([to_canonical_json(d.json()) for d in documents])


def format_reasons(left_out: Mapping[str, int]) -> str:
    """Return reasons with their counts in one line, the most frequent first."""
    return ", ".join(
        f"{reason}: {n:,}" for reason, n in sorted(left_out.items(), key=lambda kv: (-kv[1], kv[0]))
    )


def _read_locked(source: CalibrationSource, pin: LockedSource) -> tuple[Document, ...]:
    paths = [_download(source, pin.revision, receipt.path) for receipt in pin.files]
    digests = [files.hash_file(path) for path in paths]
    problems = [
        f"{pin.repo}@{pin.revision}: {receipt.path}: expected the locked sha256 {receipt.sha256},"
        f" found {digest}"
        for receipt, digest in zip(pin.files, digests, strict=True)
        if digest != receipt.sha256
    ]
    if problems:
        raise CheckError(*problems)
    documents = tuple(_read_source(source, paths))
    # The files' digests say nothing about the set's form, columns and limits, or about the code
    # that parses rows. All of these show in the documents.
    if (digest := hash_documents(documents)) != pin.sha256:
        raise CheckError(
            f"source {source.name}: expected {pin.rows} documents with the locked sha256"
            f" {pin.sha256}, found {len(documents)} with {digest}; the set has changed since it was"
            " locked: lock it again"
        )
    return documents


def _read_source(
    source: CalibrationSource, paths: list[Path], left_out: Counter[str] | None = None
) -> Iterator[Document]:
    """Yield at most ``source.rows`` documents. ``left_out`` counts rows that make none."""
    documents: Iterator[Document]
    if source.form == "documents":
        documents = (
            replace(document, source=source.name, kind=source.kind)
            for path in paths
            for document in read_document_file(path)
        )
    else:
        rows = (row for path in paths for row in read_rows(path))
        documents = forms.parse_rows(rows, source, left_out)
    # Lazy: no file is read beyond the last document, and left_out counts the rows up to it.
    return islice(documents, source.rows)


def _lock_source(source: CalibrationSource) -> LockedSource:
    repo = str(source.repo)
    with hub_client.convert_errors(repo, source.revision):
        client = hub_client.make_client()
        # The branch is resolved once. A push between listing and download would mix two commits.
        commit = str(client.repo_info(repo, repo_type="dataset", revision=source.revision).sha)
        available = sorted(client.list_repo_files(repo, repo_type="dataset", revision=commit))
    # In fnmatch "*" matches "/" too, so *.parquet includes files in folders.
    names = [n for n in available if any(fnmatch(n, pattern) for pattern in source.files)]
    names = names[: source.most_files]
    where = f"{repo}@{commit}: source {source.name}"
    if not names:
        some = ", ".join(available[:10]) + (" ..." if len(available) > 10 else "")
        raise InputError(f"{where}: expected {', '.join(source.files)}, found {some}")
    paths = [_download(source, commit, name) for name in names]
    receipts = tuple(
        Receipt(n, files.hash_file(p), p.stat().st_size) for n, p in zip(names, paths, strict=True)
    )
    left_out: Counter[str] = Counter()
    documents = tuple(_read_source(source, paths, left_out))
    skipped = left_out.total()
    if not documents or skipped > len(documents):
        reasons = f" ({format_reasons(left_out)})" if skipped else ""
        raise InputError(
            f"{where}: expected that most rows of {', '.join(names)} make documents, found"
            f" {len(documents):,} that do and {skipped:,} that do not{reasons}; the set has form"
            f" {source.form}: correct that, or set a `revision` that has this form"
        )
    return LockedSource(
        repo=repo,
        revision=commit,
        files=receipts,
        rows=len(documents),
        sha256=hash_documents(documents),
        left_out=dict(left_out),
    )


def _download(source: CalibrationSource, commit: str, name: str) -> Path:
    """Return one file of a dataset at a commit, from the hub client's cache if it is there."""
    with hub_client.convert_errors(str(source.repo), commit):
        return Path(
            hub_client.make_client().hf_hub_download(
                str(source.repo), name, repo_type="dataset", revision=commit
            )
        )
