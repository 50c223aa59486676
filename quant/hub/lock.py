"""Pin a model's source: the commit that a branch is at today, and the digest of every file in it.

A lock is JSON beside the model's recipe, ``NAME.lock.json``. A build takes the commit from it, and
refuses a file that is not the locked one, whatever the hub has by then.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.errors import CheckError, InputError
from quant.core.files import hash_git_blob
from quant.core.format import to_pretty_json
from quant.hub.checkpoint import Checkpoint, ModelSource, list_files, select_files
from quant.hub.client import COMMIT
from quant.hub.download import HubFile


@dataclass(frozen=True)
class Lock:
    """A repo at a commit, file by file."""

    repo: str
    revision: str
    files: tuple[HubFile, ...]

    def json(self) -> dict[str, Any]:
        """Return the lock as it is written: a digest that the hub does not list is left out."""
        entries = [{k: v for k, v in asdict(f).items() if v is not None} for f in self.files]
        return {"repo": self.repo, "revision": self.revision, "files": entries}


def write_lock(source: ModelSource, recipe: Path, revision: str | None = None) -> Lock:
    """Look up a model's commit and files on the hub, and write the lock beside the recipe.

    Args:
        source: The model's source.
        recipe: The model's recipe.
        revision: The branch, tag or commit to lock. None takes the source's, or ``main``.

    Raises:
        InputError: The source is a folder, or the hub does not have it.
        Unreachable: The hub does not answer.
    """
    if source.repo is None:
        raise InputError(f"{recipe}: source: expected a repo of the hub to lock, found a folder")
    commit, listed = list_files(source.repo, revision or source.revision or "main")
    lock = Lock(source.repo, commit, tuple(f for _, f in sorted(select_files(listed).items())))
    files.write_text(locate_lock(recipe), to_pretty_json(lock.json()))
    return lock


def locate_lock(recipe: Path) -> Path:
    """Return where the lock of a recipe is, whether it exists or not."""
    return recipe.with_suffix(".lock.json")


def read_lock(source: ModelSource, recipe: Path) -> Lock | None:
    """Read the lock beside a recipe, or return None if there is none.

    Raises:
        InputError: The lock is damaged, or of another repo.
    """
    path = locate_lock(recipe)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        lock = Lock(data["repo"], data["revision"], tuple(HubFile(**f) for f in data["files"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: expected a lock, found something else ({e!r});"
            " make it again with `quant lock`"
        ) from e
    if lock.repo != source.repo or not COMMIT.fullmatch(lock.revision):
        raise InputError(
            f"{path}: expected a commit of {source.repo}, found {lock.repo}@{lock.revision}"
        )
    return lock


def choose_commit(source: ModelSource, lock: Lock | None, revision: str | None) -> str | None:
    """Return the commit to build: the given revision, else the recipe's own, else the lock's."""
    if revision:
        return revision
    if source.revision and COMMIT.fullmatch(source.revision):
        return source.revision
    return lock.revision if lock else source.revision


def check_lock(checkpoint: Checkpoint, lock: Lock) -> None:
    """Compare a pulled checkpoint with its lock. Another commit is not compared.

    Raises:
        CheckError: Every file that is not the locked one.
    """
    if checkpoint.origin.get("revision") == lock.revision and (
        differences := list(_find_differences(checkpoint, lock))
    ):
        raise CheckError(*differences)


def _find_differences(checkpoint: Checkpoint, lock: Lock) -> Iterator[str]:
    receipts = {r.path: r for r in checkpoint.receipts}
    for f in lock.files:
        receipt, path = receipts.get(f.path), checkpoint.folder / f.path
        if receipt is None:
            yield f"{path}: missing; the lock has it"
        elif f.sha256 and receipt.sha256 != f.sha256:
            yield f"{path}: expected the locked sha256 {f.sha256}, found {receipt.sha256}"
        elif f.git and (git := hash_git_blob(path)) != f.git:
            yield f"{path}: expected the locked git digest {f.git}, found {git}"
