"""Pin a model's source: the commit that a branch stands for today, and the digest of every file in it.

A lock is JSON beside the model's recipe, ``NAME.lock.json``. A build takes the commit from there, and refuses a file that
is not the one that was locked, whatever the hub says by then.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.files import hash_git_blob
from quant.core.format import to_pretty_json
from quant.errors import CheckError, InputError
from quant.hub.checkpoint import Checkpoint, ModelSource, list_files, select_files
from quant.hub.client import COMMIT


@dataclass(frozen=True)
class LockedFile:
    """One file of a locked commit; the hub knows large files by sha256 and small ones by git's digest."""

    path: str
    bytes: int
    sha256: str | None = None
    git: str | None = None


@dataclass(frozen=True)
class Lock:
    """A repo at a commit, file by file."""

    repo: str
    revision: str
    files: tuple[LockedFile, ...]

    def json(self) -> dict[str, Any]:
        """As it is written."""
        kept = [{k: v for k, v in asdict(f).items() if v is not None} for f in self.files]
        return {"repo": self.repo, "revision": self.revision, "files": kept}


def write_lock(source: ModelSource, recipe: Path, revision: str | None = None) -> Lock:
    """Ask the hub what a model's branch (or tag, or commit) is now, and write the lock beside the recipe.

    Raises InputError for a model whose source is a folder, or one that the hub does not have.
    """
    if source.repo is None:
        raise InputError(f"{recipe}: source: expected a repo of the hub to lock, found a folder")
    commit, entries = list_files(source.repo, revision or source.revision or "main")
    locked = Lock(
        source.repo,
        commit,
        tuple(
            LockedFile(path, e.size, e.lfs.sha256 if e.lfs else None, None if e.lfs else e.blob_id)
            for path, e in sorted(select_files(entries).items())
        ),
    )
    files.write_text(locate_lock(recipe), to_pretty_json(locked.json()))
    return locked


def locate_lock(recipe: Path) -> Path:
    """Where the lock of a recipe is."""
    return recipe.with_suffix(".lock.json")


def read_lock(source: ModelSource, recipe: Path) -> Lock | None:
    """The lock beside a recipe, if there is one; raises InputError for one that is broken or of another repo."""
    path = locate_lock(recipe)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        found = Lock(data["repo"], data["revision"], tuple(LockedFile(**f) for f in data["files"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: expected a lock, found something else ({e!r}); make it again with `quant lock`"
        ) from e
    if found.repo != source.repo or not COMMIT.fullmatch(found.revision):
        raise InputError(
            f"{path}: expected a commit of {source.repo}, found {found.repo}@{found.revision}"
        )
    return found


def choose_commit(source: ModelSource, locked: Lock | None, asked: str | None) -> str | None:
    """The commit to build: the one that was asked for, else the recipe's own, else the lock's."""
    if asked:
        return asked
    if source.revision and COMMIT.fullmatch(source.revision):
        return source.revision
    return locked.revision if locked else source.revision


def check_lock(checkpoint: Checkpoint, locked: Lock) -> None:
    """Raise CheckFailed for every file of a pulled checkpoint that is not the locked one; another commit is not looked at."""
    if checkpoint.origin.get("revision") == locked.revision:
        wrong = list(_differences(checkpoint, locked))
        if wrong:
            raise CheckError(*wrong)


def _differences(checkpoint: Checkpoint, locked: Lock) -> Iterator[str]:
    found = {r.path: r for r in checkpoint.receipts}
    for f in locked.files:
        here = found.get(f.path)
        if here is None:
            yield f"{checkpoint.folder / f.path}: missing; the lock has it"
        elif f.sha256 and here.sha256 != f.sha256:
            yield f"{checkpoint.folder / f.path}: expected the locked sha256 {f.sha256}, found {here.sha256}"
        elif f.git and (git := hash_git_blob(checkpoint.folder / f.path)) != f.git:
            yield f"{checkpoint.folder / f.path}: expected the locked git digest {f.git}, found {git}"
