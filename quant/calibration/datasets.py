"""Where the files of a set's sources are, and the lock that pins those of the hub.

A lock is JSON beside the set, ``NAME.lock.json``: for every dataset the commit, the digest of each file, how many rows make
documents, and the digest of those documents. What is built from a lock is what was locked, or it is refused.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from quant.calibration import forms
from quant.calibration.documents import Document, read_lines
from quant.calibration.rows import read_rows as rows
from quant.calibration.sets import CalibrationSet, CalibrationSource
from quant.core import files
from quant.core.files import Receipt
from quant.core.format import hash_texts, to_canonical_json, to_pretty_json
from quant.errors import CheckError, InputError, raise_problems
from quant.hub import client as hub_client
from quant.hub.client import COMMIT


@dataclass(frozen=True)
class LockedSource:
    """One dataset of the hub, pinned."""

    repo: str
    revision: str
    files: tuple[Receipt, ...]
    rows: int
    """Documents that were made of its rows."""
    sha256: str
    """Of those documents."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that made none, by the reason."""


DatasetLock = Mapping[str, LockedSource]
"""By the name of the source."""


def lock_datasets(told: CalibrationSet, folder: Path) -> DatasetLock:
    """Ask the hub what the datasets of a set are now, fetch what is read of them, and write the lock beside the set.

    Raises InputError for what the hub does not have, for files that are not what the set says, and for a source of which
    more than half would be left out: its rows are of another form than they were.
    """
    wanted = [s for s in told.source if s.repo]
    if not wanted:
        raise InputError(
            f"calibration set {told.name}: expected a dataset of the hub to lock, found only files beside it"
        )
    found = {source.name: _lock_one(source) for source in wanted}
    files.write_text(
        dataset_lock_path(told, folder),
        to_pretty_json({name: asdict(one) for name, one in found.items()}),
    )
    return found


def dataset_lock_path(told: CalibrationSet, folder: Path) -> Path:
    """Where the lock of a set is."""
    return folder / f"{told.name}.lock.json"


def read_dataset_lock(told: CalibrationSet, folder: Path) -> DatasetLock:
    """What is pinned of a set. Raises InputError for a dataset that is not, or is another than the lock's."""
    path, wanted = dataset_lock_path(told, folder), [s for s in told.source if s.repo]
    if not wanted:
        return {}
    how = f"run `quant calibration lock {told.name}`"
    if not path.exists():
        names = ", ".join(s.name for s in wanted)
        raise InputError(
            f"{path}: missing; {names} are datasets of the hub, which are read from a lock only: {how}"
        )
    try:
        data = json.loads(path.read_text())
        found = {
            n: LockedSource(**{**one, "files": tuple(Receipt(**f) for f in one["files"])})
            for n, one in data.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: expected a lock, found something else ({e!r}); {how}") from e
    raise_problems(
        f"{path}: {s.name}: expected a commit of {s.repo}, found {found[s.name].repo if s.name in found else 'nothing'}; {how}"
        for s in wanted
        if s.name not in found
        or found[s.name].repo != s.repo
        or not COMMIT.fullmatch(found[s.name].revision)
    )
    return found


def source_identity(told: CalibrationSet, folder: Path, locked: DatasetLock) -> dict[str, Any]:
    """Everything that decides a set's documents, as plain JSON: its text, and the digests of what it reads."""
    beside = {
        s.name: [asdict(files.make_receipt(p, folder)) for p in local_files(s, folder)]
        for s in told.source
        if s.path
    }
    pinned = {name: asdict(one) for name, one in locked.items()}
    return {"set": asdict(told), "files": beside, "locked": pinned}


def local_files(source: CalibrationSource, folder: Path) -> list[Path]:
    """The files beside a set. Raises InputError when there are none."""
    found = sorted(folder.glob(str(source.path)))[: source.most_files]
    if not found:
        raise InputError(
            f"{folder / str(source.path)}: source {source.name}: expected files, found none"
        )
    return found


def read_documents(told: CalibrationSet, folder: Path, locked: DatasetLock) -> tuple[Document, ...]:
    """The documents of every source, in its order.

    Raises InputError with file, row and field for what is broken, and for a source that holds nothing; CheckFailed for a
    dataset that is not what was locked.
    """
    found: list[Document] = []
    for source in told.source:
        read = (
            tuple(_read(source, local_files(source, folder)))
            if source.repo is None
            else _locked_documents(source, locked[source.name])
        )
        if not read:
            raise InputError(
                f"calibration set {told.name}: source {source.name}: expected documents, found none"
            )
        found += read
    return tuple(found)


def _locked_documents(source: CalibrationSource, pin: LockedSource) -> tuple[Document, ...]:
    paths = [_fetch(source, pin.revision, receipt.path) for receipt in pin.files]
    wrong = [
        f"{pin.repo}@{pin.revision}: {receipt.path}: expected the locked sha256 {receipt.sha256}, found {found}"
        for receipt, path in zip(pin.files, paths, strict=True)
        if (found := files.hash_file(path)) != receipt.sha256
    ]
    if wrong:
        raise CheckError(*wrong)
    read = tuple(_read(source, paths))
    if (found := hash_set(read)) != pin.sha256:
        raise CheckError(
            f"source {source.name}: expected {pin.rows} documents with the locked sha256 {pin.sha256},"
            f" found {len(read)} with {found}; the set says something else than when it was locked: lock it again"
        )
    return read


def hash_set(found: tuple[Document, ...]) -> str:
    """Of documents, in their order."""
    return hash_texts([to_canonical_json(d.json()) for d in found])


def _read(
    source: CalibrationSource, paths: list[Path], left_out: Counter[str] | None = None
) -> Iterator[Document]:
    return islice(_all(source, paths, left_out), source.rows)


def _all(
    source: CalibrationSource, paths: list[Path], left_out: Counter[str] | None
) -> Iterator[Document]:
    if source.form == "documents":
        for path in paths:
            for d in read_lines(path):
                yield Document(
                    d.id,
                    d.language,
                    d.thinking,
                    d.messages,
                    d.tools,
                    d.text,
                    source.name,
                    source.kind,
                )
    else:
        yield from forms.parse_rows((row for path in paths for row in rows(path)), source, left_out)


def _lock_one(source: CalibrationSource) -> LockedSource:
    repo = str(source.repo)
    with hub_client.convert_errors(repo, source.revision):
        client = hub_client.make_client()
        commit = str(client.repo_info(repo, repo_type="dataset", revision=source.revision).sha)
        there = sorted(client.list_repo_files(repo, repo_type="dataset", revision=commit))
    names = [n for n in there if any(fnmatch(n, pattern) for pattern in source.files)][
        : source.most_files
    ]
    if not names:
        some = ", ".join(there[:10]) + (" ..." if len(there) > 10 else "")
        raise InputError(
            f"{repo}@{commit}: source {source.name}: expected {', '.join(source.files)}, found {some}"
        )
    paths = [_fetch(source, commit, name) for name in names]
    receipts = tuple(
        Receipt(n, files.hash_file(p), p.stat().st_size) for n, p in zip(names, paths, strict=True)
    )
    left_out: Counter[str] = Counter()
    read = tuple(_read(source, paths, left_out))
    missed = left_out.total()
    if not read or missed > len(read):
        raise InputError(
            f"{repo}@{commit}: source {source.name}: expected most rows of {', '.join(names)} to make documents, found"
            f" {len(read):,} that do and {missed:,} that do not{f' ({reasons(left_out)})' if missed else ''}; the set asks for"
            f" form {source.form}: mend that, or give a `revision` that has it"
        )
    return LockedSource(repo, commit, receipts, len(read), hash_set(read), dict(left_out))


def reasons(left_out: Mapping[str, int]) -> str:
    """Reasons and how often each was met, the most frequent first."""
    return ", ".join(
        f"{reason}: {n:,}" for reason, n in sorted(left_out.items(), key=lambda kv: (-kv[1], kv[0]))
    )


def _fetch(source: CalibrationSource, commit: str, name: str) -> Path:
    """One file of a dataset at a commit, in the cache of the hub's client."""
    with hub_client.convert_errors(str(source.repo), commit):
        return Path(
            hub_client.make_client().hf_hub_download(
                str(source.repo), name, repo_type="dataset", revision=commit
            )
        )
