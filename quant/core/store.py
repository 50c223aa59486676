"""The store of finished work, ``ROOT/<stage>/<key>/``: a run that finds its key there does nothing.

The key is the sha256 of the canonical JSON of everything that went in: digests and settings, never
paths, times or hosts. A stage works in ``<key>.partial``. When it is done, ``receipt.json`` is
written there, everything is flushed, and one rename gives the folder its final name. So a folder
under a final name is complete, after any crash.

Written by hand: the work is folders of files of up to hundreds of gigabytes, which are renamed, not
copied into a cache, and whose lengths are compared before they are used again.
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
from quant.core.errors import InputError, convert_disk_errors
from quant.core.files import Receipt
from quant.core.format import hash_json, to_canonical_json, to_pretty_json

RECEIPT = "receipt.json"
KEY_LETTERS = 24
"""96 bits of the sha256 name a folder. The receipt holds all inputs and is compared with them."""


@dataclass(frozen=True)
class StoredResult:
    """One finished piece of work."""

    folder: Path
    facts: Mapping[str, Any]
    """What the stage reports about it, as plain JSON."""
    receipts: tuple[Receipt, ...]
    fresh: bool
    """Whether this call did the work. False if the store had it already."""

    def path(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.folder / name

    def receipt(self, name: str) -> Receipt:
        """Return the receipt of one of its files."""
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
        """Return the result for these inputs, and run ``make`` only if the store has none.

        Args:
            stage: The stage's name, the first folder below the root.
            inputs: Everything that the result depends on, as plain JSON.
            make: Fills the folder that it gets, and returns the facts about the result.
            keep_partial: Give ``make`` the files that an interrupted run left, or that were
                damaged since. Otherwise its folder is empty.

        Raises:
            InputError: The disk is full, or cannot be written.
            Exception: Whatever ``make`` raises. Nothing has the final name then.
        """
        if result := self.find(stage, inputs):
            return result
        partial = self.begin(stage, inputs, keep_partial=keep_partial)
        with convert_disk_errors(partial):
            facts = make(partial)
        return self.commit(stage, inputs, facts)

    def find(self, stage: str, inputs: Mapping[str, Any]) -> StoredResult | None:
        """Return the finished result for these inputs, or None."""
        return _read_result(self._final(stage, inputs), inputs)

    def begin(self, stage: str, inputs: Mapping[str, Any], *, keep_partial: bool = False) -> Path:
        """Return the folder to do the work for these inputs in; :meth:`commit` finishes it.

        For stages that do several pieces of work at a time. Arguments as of :meth:`run_once`.
        """
        final = self._final(stage, inputs)
        partial = final.with_name(final.name + files.PARTIAL)
        with convert_disk_errors(partial):
            if keep_partial and final.exists() and not partial.exists():
                # The receipt does not fit the files. Those that are intact can be used again.
                final.rename(partial)
                files.remove(partial / RECEIPT)
            files.remove(final)
            if not keep_partial:
                files.remove(partial)
            partial.mkdir(parents=True, exist_ok=True)
        return partial

    def commit(
        self, stage: str, inputs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> StoredResult:
        """Hash everything in the folder of these inputs and give the folder its final name."""
        final = self._final(stage, inputs)
        partial = final.with_name(final.name + files.PARTIAL)
        with convert_disk_errors(partial):
            outputs = [p for p in sorted(partial.rglob("*")) if _is_output(p)]
            # Threads suffice: hashlib releases the GIL.
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
                receipts = list(threads.map(lambda p: files.make_receipt(p, partial), outputs))
            record = {"inputs": inputs, "facts": facts, "files": [asdict(r) for r in receipts]}
            files.write_text(partial / RECEIPT, to_pretty_json(record))
            files.commit_folder(partial, final)
        return StoredResult(final, facts, tuple(receipts), fresh=True)

    def list_results(self, stage: str) -> Iterator[tuple[Mapping[str, Any], StoredResult]]:
        """Yield the inputs and the result of everything that a stage has finished."""
        for folder in sorted((self.root / stage).glob("*")):
            try:
                inputs = json.loads((folder / RECEIPT).read_text())["inputs"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if result := _read_result(folder, inputs):
                yield inputs, result

    def work_folder(self, stage: str) -> Path:
        """Return the folder in which a stage keeps what helps its next run, and no result."""
        return self.root / stage / "work"

    def _final(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        return self.root / stage / hash_inputs(inputs)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the store for this process while the block runs.

        The lock is released even if the process is killed: it is ``flock``, which the kernel holds.

        Raises:
            InputError: Another process has the lock; it is named.
        """
        with convert_disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                holder = self._holder()
                name = holder.read_text().strip() if holder.exists() else "another process"
                raise InputError(
                    f"{self.root}: in use by {name}; wait for it, or take another folder"
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
        """Return the file that names the process that has the lock."""
        return self.root / "held-by"


def hash_inputs(inputs: Mapping[str, Any]) -> str:
    """Return the key of a result: equal inputs have equal keys, and nothing else counts."""
    return hash_json(inputs)[:KEY_LETTERS]


def _is_output(path: Path) -> bool:
    # A link, as the converter makes to the checkpoint, points to files with receipts elsewhere.
    return path.is_file() and not path.is_symlink()


def _read_result(folder: Path, inputs: Mapping[str, Any]) -> StoredResult | None:
    """Return the result in a folder, or None if its receipt does not fit inputs and files.

    Lengths are compared, digests are not: reading hundreds of gigabytes at every start would cost
    minutes. Digests are compared before anything is published.
    """
    try:
        record = json.loads((folder / RECEIPT).read_text())
        facts = record["facts"]
        receipts = tuple(Receipt(**r) for r in record["files"])
        # As text: inputs may hold tuples, which the receipt has as lists.
        same = to_canonical_json(record["inputs"]) == to_canonical_json(inputs)
        whole = all((folder / r.path).stat().st_size == r.bytes for r in receipts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return StoredResult(folder, facts, receipts, fresh=False) if same and whole else None
