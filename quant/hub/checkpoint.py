"""Pull a checkpoint, a commit of the hub or a folder, and verify every file before it is read.

This is the only module that downloads weights. A commit is named by its 40 letters, because a
branch may move between two files.
"""

import json
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from quant.core import digest_cache, files
from quant.core.errors import raise_problems
from quant.core.files import Receipt
from quant.core.store import Store
from quant.core.toml import Strict
from quant.hub import client as hub_client
from quant.hub.client import COMMIT, REPO
from quant.hub.download import HubFile, download_files

T = TypeVar("T")


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
"""Files that a conversion may need. Weights in other formats can run code and are never pulled."""
DIGESTS = "digests.json"
SAFE_NAME = re.compile(r"\w[^\x00-\x1f\x7f/\\:]{0,200}")
"""A file name that may be written here: no separator of any system, no drive, no leading dot."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
UNSAFE_WEIGHTS = (".bin", ".pt", ".pth")
"""Formats of PyTorch, which are pickles: loading one can run code."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, a little-endian u64."""


@dataclass(frozen=True)
class Checkpoint:
    """A model as its authors published it."""

    folder: Path
    origin: Mapping[str, str]
    """The repo and commit, or the folder's name; never a path of this machine."""
    receipts: tuple[Receipt, ...]
    """Every file that the conversion may read."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return dict(json.loads((self.folder / "config.json").read_text()))

    @property
    def chat_template(self) -> tuple[str, str] | None:
        """The chat template and where it is, or None.

        The key in tokenizer_config.json wins over chat_template.jinja, as in llama.cpp's converter.
        """
        config = self.folder / "tokenizer_config.json"
        if config.exists():
            text = json.loads(config.read_text()).get("chat_template")
            if isinstance(text, str):
                return text, f"{config}: chat_template"
        path = self.folder / "chat_template.jinja"
        return (path.read_text(), str(path)) if path.exists() else None


def pull_checkpoint(source: ModelSource, beside: Path, store: Store) -> Checkpoint:
    """Return the checkpoint that a model names; pull it if the store does not have it.

    Args:
        source: The repo and commit, or the folder.
        beside: The folder that a relative ``source.folder`` begins in.
        store: Keeps what was pulled, and the digests of a folder.

    Raises:
        InputError: Everything that is wrong with the checkpoint, or the hub refuses it.
        CheckError: A file is not what the hub lists.
        Unreachable: The hub does not answer; the same call continues.
    """
    if source.folder is not None:
        return read_checkpoint((beside / source.folder).resolve(), store)
    repo, revision = str(source.repo), source.revision or "main"
    raise_problems(_find_pin_problems(repo, revision))
    origin = {"repo": repo, "revision": revision}
    # keep_partial: files that were fetched before an interruption may be hundreds of gigabytes.
    result = store.run_once(
        "source", origin, lambda partial: _download(repo, revision, partial), keep_partial=True
    )
    folder = result.folder / "checkpoint"
    raise_problems(find_checkpoint_problems(folder))
    receipts = tuple(
        Receipt(r.path.removeprefix("checkpoint/"), r.sha256, r.bytes)
        for r in result.receipts
        if r.path.startswith("checkpoint/")
    )
    return Checkpoint(folder, origin, receipts)


def read_checkpoint(folder: Path, store: Store | None = None) -> Checkpoint:
    """Verify and hash the checkpoint in a folder.

    Args:
        folder: A folder in the layout of the hub.
        store: Remembers the digests. None hashes every file again.

    Raises:
        InputError: Everything that is wrong with it.
    """
    raise_problems(find_checkpoint_problems(folder))
    return Checkpoint(folder, {"folder": folder.name}, hash_checkpoint(folder, store))


def find_checkpoint_problems(folder: Path) -> Iterator[str]:
    """Yield every reason why a folder cannot be converted."""
    if not folder.is_dir():
        actual = "a file" if folder.exists() else "nothing"
        yield f"{folder}: expected a folder with a checkpoint, found {actual}"
        return
    yield from _find_config_problems(folder / "config.json")
    if not any((folder / name).exists() for name in TOKENIZERS):
        yield f"{folder}: expected a tokenizer ({' or '.join(TOKENIZERS)}), found none"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        unsafe = sorted(p.name for p in folder.iterdir() if p.suffix in UNSAFE_WEIGHTS)
        actual = f"only {unsafe[0]}, which can run code when it is loaded" if unsafe else "none"
        yield (
            f"{folder}: expected weights in *.safetensors, found {actual};"
            " convert them with safetensors first"
        )
    for path in weights:
        yield from find_safetensors_problems(path)
    yield from _find_index_problems(folder / "model.safetensors.index.json")


def find_safetensors_problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with one safetensors file.

    The file's length is compared with its own header first, so that the error of a file that was
    cut has both numbers; then the library checks the rest.
    """
    from safetensors import SafetensorError, safe_open  # imports numpy, which few commands need

    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == LENGTH_BYTES else 0
        # "{}" is the shortest header. An absurd length is not read into memory.
        raw = f.read(length) if 2 <= length <= size - LENGTH_BYTES else b""
    if not raw:
        yield (
            f"{path}: expected a safetensors header,"
            f" found a file of {size} bytes without a whole one"
        )
        return
    try:
        header = json.loads(raw)
        ends = {n: t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"}
        last = max(ends, key=lambda n: ends[n], default="none")
        expected = LENGTH_BYTES + length + ends.get(last, 0)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        yield f"{path}: expected a safetensors header, found something else ({e!r})"
        return
    if size != expected:
        yield (
            f"{path}: expected {expected} bytes (the last tensor is {last}), found {size};"
            " fetch the file again"
        )
        return
    try:
        with safe_open(path, framework="numpy") as f:
            f.keys()
    except SafetensorError as e:
        yield f"{path}: not a sound safetensors file: {e}"


def hash_checkpoint(folder: Path, store: Store | None) -> tuple[Receipt, ...]:
    """Return a receipt for every file of a checkpoint's folder that a conversion may need."""
    # Remembered in the store: hashing 700 GB at every start would cost minutes.
    paths = sorted({p for pattern in PATTERNS for p in folder.glob(pattern) if p.is_file()})
    digests = digest_cache.hash_files(paths, store.root / DIGESTS if store else None)
    return tuple(Receipt(p.name, digests[p], p.stat().st_size) for p in paths)


def list_files(repo: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """Ask the hub for a commit and its top-level files. Nothing deeper of a checkpoint is read.

    Args:
        repo: OWNER/NAME.
        revision: A branch, tag or commit.

    Returns:
        The commit that the revision stands for, and its files by path.

    Raises:
        InputError: The hub does not have it, or refuses it.
        Unreachable: The hub does not answer.
    """
    from huggingface_hub.hf_api import RepoFile

    with hub_client.convert_errors(repo, revision):
        api = hub_client.make_client()
        commit = revision
        if not COMMIT.fullmatch(revision):
            # Resolved first: a branch may move before its files are listed.
            commit = str(api.repo_info(repo, revision=revision).sha)
        tree = api.list_repo_tree(repo, revision=commit)
        return commit, {e.path: _convert_entry(e) for e in tree if isinstance(e, RepoFile)}


def select_files(listed: Mapping[str, T]) -> dict[str, T]:
    """Return those of a commit's files that a conversion may need."""
    return {path: f for path, f in listed.items() if any(fnmatch(path, p) for p in PATTERNS)}


def _convert_entry(entry: Any) -> HubFile:
    if entry.lfs:
        return HubFile(entry.path, entry.size, sha256=entry.lfs.sha256)
    return HubFile(entry.path, entry.size, git=entry.blob_id)


def _find_config_problems(path: Path) -> Iterator[str]:
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
    # auto_map names Python files of the repo, which transformers runs with trust_remote_code.
    elif config.get("auto_map"):
        yield (
            f"{path}: auto_map: expected a model that transformers knows,"
            " found one that brings code of its own"
        )


def _find_index_problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with an index. It may only name safetensors files beside it."""
    if not path.exists():
        return
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        yield (
            f"{path}: weight_map: expected a map from tensors to files,"
            f" found something else ({e!r})"
        )
        return
    for name in sorted(map(str, names)):
        # The names come from the repo: one with a separator or `..` would lead out of the folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            yield (
                f"{path}: weight_map: expected the name of a safetensors file beside it,"
                f" found {name!r}"
            )
        elif not (path.parent / name).exists():
            yield f"{path.parent / name}: missing; {path.name} says that it holds tensors"


def _find_pin_problems(repo: str, revision: str) -> Iterator[str]:
    if not REPO.fullmatch(repo):
        yield f"source.repo: expected OWNER/NAME, found {repo!r}"
    if not COMMIT.fullmatch(revision):
        yield (
            f"source.revision: expected a commit of {repo} (40 letters of hex), found {revision!r};"
            " name one with --revision, or pin it: quant lock MODEL"
        )


def _download(repo: str, revision: str, partial: Path) -> dict[str, Any]:
    """Fetch what a conversion may need of one commit, and continue what an earlier run left."""
    folder = partial / "checkpoint"
    for leftover in folder.glob(".cache/**/*.incomplete"):
        leftover.unlink()  # the client starts an unfinished file again, under another name
    _, listed = list_files(repo, revision)
    raise_problems(_find_listing_problems(f"{repo}@{revision}", listed))
    wanted = select_files(listed)
    for path in [p for p in folder.glob("*") if p.is_file() and p.name not in wanted]:
        files.remove(path)  # the patterns were others when it was fetched
    download_files(repo, revision, [f for _, f in sorted(wanted.items())], folder)
    files.remove(folder / ".cache")
    return {"files": len(wanted)}


def _find_listing_problems(commit: str, names: Collection[str]) -> Iterator[str]:
    """Yield why it is no use to fetch a commit with these files."""
    if not any(name.endswith(".safetensors") for name in names):
        others = ", ".join(n for n in names if Path(n).suffix in (*UNSAFE_WEIGHTS, ".gguf"))
        yield (
            f"{commit}: expected weights in *.safetensors, found {others or 'none'};"
            " name a repo or commit that has them"
        )
    yield from (
        f"{commit}: expected names of files, found {name!r}, which is not safe to write here"
        for name in select_files(dict.fromkeys(names))
        if not SAFE_NAME.fullmatch(name)
    )
