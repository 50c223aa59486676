"""Digests of large files, remembered: hundreds of gigabytes are hashed once, not at every start.

An entry is valid while the file's length, inode, mtime and ctime are all unchanged. ctime is the
one that counts: copying or ``touch`` can set mtime back, but no call sets ctime. ctime also changes
when a hard link is added or removed; that costs one more hash and nothing else.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.format import to_pretty_json


def hash_files(paths: Iterable[Path], cache: Path | None) -> dict[Path, str]:
    """Return the sha256 of every file, and remember it.

    Args:
        paths: The files to hash.
        cache: The JSON file that holds the digests. None hashes every file again. A cache that is
            missing or damaged is written anew.

    Raises:
        OSError: A file cannot be read.
    """
    known: dict[str, Any] = {}
    if cache:
        with suppress(OSError, ValueError):
            known = json.loads(cache.read_text())
    entries = {path: _make_entry(path, known.get(str(path))) for path in paths}
    current = {str(path): entry for path, entry in entries.items()}
    if cache and any(known.get(name) != entry for name, entry in current.items()):
        # Entries of other files stay: the downloader asks for one file at a time, with one cache.
        files.write_text(cache, to_pretty_json(known | current))
    return {path: str(entry["sha256"]) for path, entry in entries.items()}


def save_digests(digests: dict[Path, str], cache: Path) -> None:
    """Write a cache that holds these digests, of files that were just read, and no others."""
    entries = {
        str(path): {"state": _read_state(path), "sha256": sha256}
        for path, sha256 in digests.items()
    }
    files.write_text(cache, to_pretty_json(entries))


def _make_entry(path: Path, known: Any) -> dict[str, Any]:
    """Return the known entry if it is still valid, else a new one."""
    state = _read_state(path)
    if isinstance(known, dict) and known.get("state") == state:
        return known
    return {"state": state, "sha256": files.hash_file(path)}


def _read_state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
