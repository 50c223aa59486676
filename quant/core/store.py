"""Where finished work is kept: ``ROOT/<stage>/<key>/``, and a run that finds its key there does nothing.

The key is the sha256 of one canonical JSON of everything that went in: digests and settings, never paths, times or
hosts. A stage works in ``<key>.partial``; when it is done, ``receipt.json`` is written there, all of it is flushed, and
the folder gets its final name in one rename. So a folder under a final name is complete, after any crash.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quant.core import files
from quant.core.files import Receipt
from quant.core.format import hash_json, to_canonical_json, to_pretty_json
from quant.errors import InputError, convert_disk_errors

RECEIPT = "receipt.json"
KEY_LETTERS = 24
"""96 bits of the sha256 name a folder; the receipt holds all inputs and is compared with them."""


@dataclass(frozen=True)
class StoredResult:
    """One finished piece of work."""

    folder: Path
    facts: Mapping[str, Any]
    """What the stage has to say about it, as plain JSON."""
    receipts: tuple[Receipt, ...]
    fresh: bool
    """False when it was found and not made."""

    def path(self, name: str) -> Path:
        """Where one of its files lies."""
        return self.folder / name

    def receipt(self, name: str) -> Receipt:
        """What was written under that name."""
        return next(r for r in self.receipts if r.path == name)


@dataclass(frozen=True)
class Store:
    """A folder of finished work."""

    root: Path

    def run_once(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], Mapping[str, Any]],
        *,
        keep_partial: bool = False,
    ) -> StoredResult:
        """The work of ``make`` for these inputs, done now or found done.

        ``make`` gets an empty folder (with ``keep_partial``: what an interrupted run left, or what was damaged since),
        fills it, and returns its facts. Raises whatever ``make`` raises; then nothing stands under the final name.
        """
        if found := self.find(stage, inputs):
            return found
        partial = self.begin(stage, inputs, keep_partial=keep_partial)
        with convert_disk_errors(partial):
            facts = make(partial)
        return self.commit(stage, inputs, facts)

    def find(self, stage: str, inputs: Mapping[str, Any]) -> StoredResult | None:
        """What stands there for these inputs."""
        return _read(self._final(stage, inputs), inputs)

    def begin(self, stage: str, inputs: Mapping[str, Any], *, keep_partial: bool = False) -> Path:
        """A folder to make something for these inputs in; :meth:`commit` gives it its final name."""
        final = self._final(stage, inputs)
        partial = final.with_name(final.name + files.PARTIAL)
        with convert_disk_errors(partial):
            if keep_partial and final.exists() and not partial.exists():
                final.rename(
                    partial
                )  # a receipt that does not fit its files: what is sound of them can stay
                files.remove(partial / RECEIPT)
            files.remove(final)
            if not keep_partial:
                files.remove(partial)
            partial.mkdir(parents=True, exist_ok=True)
        return partial

    def commit(
        self, stage: str, inputs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> StoredResult:
        """Say that the folder of these inputs is complete, with everything that is in it."""
        final = self._final(stage, inputs)
        partial = final.with_name(final.name + files.PARTIAL)
        with convert_disk_errors(partial):
            outputs = [p for p in sorted(partial.rglob("*")) if _is_output(p)]
            with ThreadPoolExecutor(
                len(os.sched_getaffinity(0))
            ) as readers:  # hashing lets go of Python's lock
                receipts = list(readers.map(lambda p: files.make_receipt(p, partial), outputs))
            record = {"inputs": inputs, "facts": facts, "files": [asdict(r) for r in receipts]}
            files.write_text(partial / RECEIPT, to_pretty_json(record))
            files.commit_folder(partial, final)
        return StoredResult(final, facts, tuple(receipts), fresh=True)

    def list_results(self, stage: str) -> Iterator[tuple[Mapping[str, Any], StoredResult]]:
        """Everything that was ever finished in a stage and still stands, with what went in."""
        for folder in sorted((self.root / stage).glob("*")):
            try:
                inputs = json.loads((folder / RECEIPT).read_text())["inputs"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if done := _read(folder, inputs):
                yield inputs, done

    def work_folder(self, stage: str) -> Path:
        """Where a stage may keep what is of use to its next run only."""
        return self.root / stage / "work"

    def _final(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        return self.root / stage / hash_inputs(inputs)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of it however the process ends.

        Raises InputError that names the holder when another run has it.
        """
        with convert_disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                holder = (
                    self._holder().read_text() if self._holder().exists() else "another process"
                )
                raise InputError(
                    f"{self.root}: in use by {holder.strip()}; wait for it, or take another folder"
                ) from None
        try:
            with convert_disk_errors(self.root):
                files.write_text(
                    self._holder(), f"process {os.getpid()} on {socket.gethostname()}\n"
                )
            yield
        finally:
            self._holder().unlink(missing_ok=True)
            lock.release()

    def _holder(self) -> Path:
        return self.root / "held-by"


def hash_inputs(inputs: Mapping[str, Any]) -> str:
    """The name of everything that these inputs can produce: equal inputs, equal key, and nothing else counts."""
    return hash_json(inputs)[:KEY_LETTERS]


def _is_output(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _read(folder: Path, inputs: Mapping[str, Any]) -> StoredResult | None:
    """What stands there, if its receipt fits the inputs and every file has the length that was written.

    Lengths always, digests not: a digest is compared before anything is published.
    """
    try:
        record = json.loads((folder / RECEIPT).read_text())
        facts = record["facts"]
        receipts = tuple(Receipt(**r) for r in record["files"])
        same = to_canonical_json(record["inputs"]) == to_canonical_json(inputs)
        whole = all((folder / r.path).stat().st_size == r.bytes for r in receipts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return StoredResult(folder, facts, receipts, fresh=False) if same and whole else None
