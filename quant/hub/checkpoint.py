"""Pull a checkpoint: a commit of the hub, or a folder; every file is verified before anything reads it.

The only module that downloads weights. A commit is named by its 40 letters, because a branch may move between two files.
"""

import json
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quant.core import digest_cache, files
from quant.core.files import Receipt
from quant.core.store import Store
from quant.core.toml import Strict
from quant.errors import raise_problems
from quant.hub import client as hub_client
from quant.hub.client import COMMIT, REPO
from quant.hub.download import download_files


@dataclass(frozen=True)
class ModelSource(Strict):
    """Where a model's weights come from: a repo of the hub at a commit, or a folder."""

    repo: str | None = None
    revision: str | None = None
    folder: str | None = None


PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "tokenizer*",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
)
"""What a conversion can need; weights in other formats can carry code and are never pulled."""
DIGESTS = "digests.json"
SAFE_NAME = re.compile(r"\w[^\x00-\x1f\x7f/\\:]{0,200}")
"""Of a file that is fetched: no separator of any system, no drive, nothing that begins with a dot or a dash."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model as its authors published it."""

    folder: Path
    origin: Mapping[str, str]
    """The repo and commit, or that it was a folder; never a path."""
    receipts: tuple[Receipt, ...]
    """Every file that the conversion may read."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return dict(json.loads((self.folder / "config.json").read_text()))

    @property
    def chat_template(self) -> tuple[str, str] | None:
        """The template and the file that it is in; the key in tokenizer_config.json wins, as it does in the converter."""
        config = self.folder / "tokenizer_config.json"
        if config.exists() and isinstance(
            text := json.loads(config.read_text()).get("chat_template"), str
        ):
            return text, f"{config}: chat_template"
        path = self.folder / "chat_template.jinja"
        return (path.read_text(), str(path)) if path.exists() else None


def pull_checkpoint(source: ModelSource, beside: Path, store: Store) -> Checkpoint:
    """The checkpoint that a model names; relative folders are looked for in the folder ``beside``.

    Raises InputError with everything that is wrong with it, CheckFailed when what came is not what the hub has,
    Unreachable when the hub does not answer.
    """
    if source.folder is not None:
        return read_checkpoint((beside / source.folder).resolve(), store)
    repo, revision = str(source.repo), source.revision or "main"
    raise_problems(_pin_problems(repo, revision))
    origin = {"repo": repo, "revision": revision}
    done = store.run_once(
        "source", origin, lambda partial: _download(repo, revision, partial), keep_partial=True
    )
    folder = done.folder / "checkpoint"
    raise_problems(find_checkpoint_problems(folder))
    receipts = tuple(
        Receipt(r.path.removeprefix("checkpoint/"), r.sha256, r.bytes)
        for r in done.receipts
        if r.path.startswith("checkpoint/")
    )
    return Checkpoint(folder, origin, receipts)


def read_checkpoint(folder: Path, store: Store | None = None) -> Checkpoint:
    """The checkpoint in a folder, verified; digests are remembered in the store. Raises InputError with every problem."""
    raise_problems(find_checkpoint_problems(folder))
    return Checkpoint(folder, {"folder": folder.name}, hash_checkpoint(folder, store))


def find_checkpoint_problems(folder: Path) -> Iterator[str]:
    """Every reason why this folder cannot be converted; nothing means that it can."""
    if not folder.is_dir():
        yield f"{folder}: expected a folder with a checkpoint, found {'a file' if folder.exists() else 'nothing'}"
        return
    yield from _config_problems(folder / "config.json")
    if not any((folder / name).exists() for name in TOKENIZERS):
        yield f"{folder}: expected a tokenizer ({' or '.join(TOKENIZERS)}), found none"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = sorted(
            p.name for ending in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ending)
        )
        found = f"only {others[0]}, which can run code when it is loaded" if others else "none"
        yield f"{folder}: expected weights in *.safetensors, found {found}; convert them with safetensors first"
    for path in weights:
        yield from find_safetensors_problems(path)
    yield from _index_problems(folder / "model.safetensors.index.json")


def find_safetensors_problems(path: Path) -> Iterator[str]:
    """What is wrong with one safetensors file: its length against its own header, then the library's checks."""
    from safetensors import (  # numpy comes with it: not for commands that read no weights
        SafetensorError,
        safe_open,
    )

    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        raw = f.read(length) if 2 <= length <= size - 8 else b""
    if not raw:
        yield f"{path}: expected a safetensors header, found a file of {size} bytes without a whole one"
        return
    try:
        header = json.loads(raw)
        expected = (
            8
            + length
            + max(
                (t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        yield f"{path}: expected a safetensors header, found something else ({e!r})"
        return
    if size != expected:
        last = max(
            (n for n in header if n != "__metadata__"),
            key=lambda n: header[n]["data_offsets"][1],
            default="none",
        )
        yield f"{path}: expected {expected} bytes (the last tensor is {last}), found {size}; fetch the file again"
        return
    try:
        with safe_open(path, framework="numpy") as f:
            f.keys()
    except SafetensorError as e:
        yield f"{path}: not a sound safetensors file: {e}"


def hash_checkpoint(folder: Path, store: Store | None) -> tuple[Receipt, ...]:
    """A receipt for every file of a checkpoint's folder.

    Digests are remembered in the store: hashing 700 GB on every start would cost minutes.
    """
    wanted = sorted({p for pattern in PATTERNS for p in folder.glob(pattern) if p.is_file()})
    found = digest_cache.hash_files(wanted, store.root / DIGESTS if store else None)
    return tuple(Receipt(p.name, found[p], p.stat().st_size) for p in wanted)


def _config_problems(path: Path) -> Iterator[str]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        yield f"{path}: missing; expected the configuration of a Hugging Face checkpoint"
        return
    except (OSError, ValueError) as e:
        yield f"{path}: expected JSON, found something else ({e})"
        return
    if not isinstance(config, dict) or not config.get("architectures"):
        yield f"{path}: architectures: expected the name of the model's class, found none"
    elif config.get("auto_map"):
        yield f"{path}: auto_map: expected a model that transformers knows, found one that brings code of its own"


def _index_problems(path: Path) -> Iterator[str]:
    """An index may only name safetensors files that lie beside it."""
    if not path.exists():
        return
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        yield f"{path}: weight_map: expected a map from tensors to files, found something else ({e!r})"
        return
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            yield f"{path}: weight_map: expected the name of a safetensors file beside it, found {name!r}"
        elif not (path.parent / name).exists():
            yield f"{path.parent / name}: missing; {path.name} says that it holds tensors"


def _pin_problems(repo: str, revision: str) -> Iterator[str]:
    if not REPO.fullmatch(repo):
        yield f"source.repo: expected OWNER/NAME, found {repo!r}"
    if not COMMIT.fullmatch(revision):
        yield (
            f"source.revision: expected a commit of {repo} (40 letters of hex), found {revision!r};"
            " name one with --revision, or pin it: quant lock MODEL"
        )


def _download(repo: str, revision: str, partial: Path) -> dict[str, Any]:
    """Fetch what is wanted of one commit, continuing what an interrupted run left, each file compared with the hub's list."""
    folder = partial / "checkpoint"
    for orphan in folder.glob(".cache/**/*.incomplete"):
        orphan.unlink()  # the client begins an unfinished file anew, under another name
    _, entries = list_files(repo, revision)
    raise_problems(_listing_problems(f"{repo}@{revision}", entries))
    wanted = select_files(entries)
    for stranger in [p for p in folder.glob("*") if p.is_file() and p.name not in wanted]:
        files.remove(stranger)  # of a list that was another
    asked = [
        {
            "path": path,
            "bytes": e.size,
            "sha256": e.lfs.sha256 if e.lfs else None,
            "git": None if e.lfs else e.blob_id,
        }
        for path, e in sorted(wanted.items())
    ]
    download_files(repo, revision, asked, folder)
    files.remove(folder / ".cache")
    return {"files": len(wanted)}


def list_files(repo: str, revision: str) -> tuple[str, dict[str, Any]]:
    """The commit that a branch, tag or commit stands for, and what the hub says of the files at its top, by path.

    A checkpoint has nothing deeper that is read. Raises InputError for what the hub does not have, Unreachable when it
    does not answer.
    """
    from huggingface_hub.hf_api import RepoFile

    with hub_client.convert_errors(repo, revision):
        api = hub_client.make_client()
        commit = (
            revision
            if COMMIT.fullmatch(revision)
            else str(api.repo_info(repo, revision=revision).sha)
        )
        tree = api.list_repo_tree(repo, revision=commit)
        return commit, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def select_files(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Of a commit's files, those that a conversion can need."""
    return {
        path: entry for path, entry in entries.items() if any(fnmatch(path, p) for p in PATTERNS)
    }


def _listing_problems(commit: str, names: Collection[str]) -> Iterator[str]:
    """What makes fetching a commit pointless."""
    if not any(name.endswith(".safetensors") for name in names):
        others = ", ".join(
            name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        yield f"{commit}: expected weights in *.safetensors, found {others or 'none'}; name a repo or commit that has them"
    yield from (
        f"{commit}: expected names of files, found {name!r}, which is not safe to write here"
        for name in names
        if not SAFE_NAME.fullmatch(name) and any(fnmatch(name, p) for p in PATTERNS)
    )
