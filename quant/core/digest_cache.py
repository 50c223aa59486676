"""Digests that are remembered: hundreds of gigabytes are read once, and again only when something touched them.

A digest stands with the file's length, inode and both of its times, and is used again while all of them do. The change time
cannot be set back by copying or touching; it also moves when a second name of the file is made or taken away, which costs a
reading and nothing else.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.format import to_pretty_json


def hash_files(paths: Iterable[Path], memory: Path | None) -> dict[Path, str]:
    """The sha256 of every file, remembered in the file ``memory``; without one, everything is read."""
    known: dict[str, Any] = {}
    if memory:
        with suppress(OSError, ValueError):
            known = json.loads(memory.read_text())
    fresh = {path: _remembered(path, known.get(str(path))) for path in paths}
    found = {str(path): entry for path, entry in fresh.items()}
    if memory and any(known.get(name) != entry for name, entry in found.items()):
        files.write_text(memory, to_pretty_json(known | found))
    return {path: str(entry["sha256"]) for path, entry in fresh.items()}


def save_digests(known: dict[Path, str], memory: Path) -> None:
    """Remember digests of files that were read just now, and forget all others."""
    found = {str(path): {"state": _state(path), "sha256": sha256} for path, sha256 in known.items()}
    files.write_text(memory, to_pretty_json(found))


def _remembered(path: Path, entry: Any) -> dict[str, Any]:
    state = _state(path)
    if isinstance(entry, dict) and entry.get("state") == state:
        return entry
    return {"state": state, "sha256": files.hash_file(path)}


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
