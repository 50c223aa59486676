"""Pull a checkpoint: a commit of the hub, or a folder; every file is verified before anything reads it.

The only module that downloads weights. A commit is named by its 40 letters, because a branch may move between two files.
"""

import hashlib
import json
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quant import files, hub, memory
from quant.errors import CheckFailed, refuse
from quant.files import Receipt
from quant.recipe import COMMIT, REPO, Source
from quant.store import Store

WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt", "LICENSE*")
"""What a conversion can need; weights in other formats can carry code and are never pulled."""
DIGESTS = "digests.json"
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
        if config.exists() and isinstance(text := json.loads(config.read_text()).get("chat_template"), str):
            return text, f"{config}: chat_template"
        path = self.folder / "chat_template.jinja"
        return (path.read_text(), str(path)) if path.exists() else None


def pull(source: Source, beside: Path, store: Store) -> Checkpoint:
    """The checkpoint that a model names; relative folders are looked for in the folder ``beside``.

    Raises InputError with everything that is wrong with it, CheckFailed when what came is not what the hub has,
    Unreachable when the hub does not answer.
    """
    if source.folder is not None:
        return take((beside / source.folder).resolve(), store)
    repo, revision = str(source.repo), source.revision or "main"
    refuse(_pin_problems(repo, revision))
    origin = {"repo": repo, "revision": revision}
    done = store.once("source", origin, lambda partial: _download(repo, revision, partial), keep_partial=True)
    folder = done.folder / "checkpoint"
    refuse(checkpoint_problems(folder))
    receipts = tuple(
        Receipt(r.path.removeprefix("checkpoint/"), r.sha256, r.bytes)
        for r in done.receipts
        if r.path.startswith("checkpoint/")
    )
    return Checkpoint(folder, origin, receipts)


def take(folder: Path, store: Store | None = None) -> Checkpoint:
    """The checkpoint in a folder, verified; digests are remembered in the store. Raises InputError with every problem."""
    refuse(checkpoint_problems(folder))
    return Checkpoint(folder, {"folder": folder.name}, digests(folder, store))


def checkpoint_problems(folder: Path) -> Iterator[str]:
    """Every reason why this folder cannot be converted; nothing means that it can."""
    if not folder.is_dir():
        yield f"{folder}: expected a folder with a checkpoint, found {'a file' if folder.exists() else 'nothing'}"
        return
    yield from _config_problems(folder / "config.json")
    if not any((folder / name).exists() for name in TOKENIZERS):
        yield f"{folder}: expected a tokenizer ({' or '.join(TOKENIZERS)}), found none"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ending))
        found = f"only {others[0]}, which can run code when it is loaded" if others else "none"
        yield f"{folder}: expected weights in *.safetensors, found {found}; convert them with safetensors first"
    for path in weights:
        yield from safetensors_problems(path)
    yield from _index_problems(folder / "model.safetensors.index.json")


def safetensors_problems(path: Path) -> Iterator[str]:
    """What is wrong with one safetensors file: its length against its own header, then the library's checks."""
    from safetensors import SafetensorError, safe_open  # numpy comes with it: not for commands that read no weights

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
        expected = 8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        yield f"{path}: expected a safetensors header, found something else ({e!r})"
        return
    if size != expected:
        last = max(
            (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1], default="none"
        )
        yield f"{path}: expected {expected} bytes (the last tensor is {last}), found {size}; fetch the file again"
        return
    try:
        with safe_open(path, framework="numpy") as f:
            f.keys()
    except SafetensorError as e:
        yield f"{path}: not a sound safetensors file: {e}"


def digests(folder: Path, store: Store | None) -> tuple[Receipt, ...]:
    """A receipt for every file of a checkpoint's folder.

    Digests are remembered in the store: hashing 700 GB on every start would cost minutes.
    """
    wanted = sorted({p for pattern in WANTED for p in folder.glob(pattern) if p.is_file()})
    found = memory.digests(wanted, store.root / DIGESTS if store else None)
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
    """Fetch what is wanted of one commit, continuing what an interrupted run left, and compare it with the hub's list."""
    folder = partial / "checkpoint"
    for orphan in folder.glob(".cache/**/*.incomplete"):
        orphan.unlink()  # the client begins an unfinished file anew, under another name
    _, entries = listing(repo, revision)
    refuse(_listing_problems(f"{repo}@{revision}", entries))
    wanted = wanted_of(entries)
    with hub.errors(repo, revision):
        _fetch(repo, revision, folder)
    files.remove(folder / ".cache")
    wrong = list(_differences(folder, wanted))
    if wrong:
        for path, _ in wrong:
            files.remove(folder / path)
        raise CheckFailed(*(f"{repo}@{revision}: {message}; run again to fetch it again" for _, message in wrong))
    return {"files": len(wanted)}


def _fetch(repo: str, revision: str, folder: Path) -> None:
    """Let the hub's client fetch, in a way that can be interrupted: left alone, it ends every file that it has begun."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    interrupted = threading.Event()

    class Bar(tqdm):
        """Shown on a terminal only; told of every piece that came, it is where the client can be stopped."""

        def __init__(self, *args: Any, **kw: Any) -> None:
            super().__init__(*args, **{"disable": None} | kw)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> Any:
            if interrupted.is_set():
                raise InterruptedError
            return super().update(n)

    with ThreadPoolExecutor(1) as beside:
        fetching = beside.submit(
            snapshot_download, repo, revision=revision, local_dir=folder, token=hub.token() or False,
            allow_patterns=list(WANTED), ignore_patterns=["*/*"], tqdm_class=Bar,
        )  # fmt: skip
        try:
            fetching.result()
        except BaseException as e:
            if not isinstance(e, Exception):
                interrupted.set()
            raise


def listing(repo: str, revision: str) -> tuple[str, dict[str, Any]]:
    """The commit that a branch, tag or commit stands for, and what the hub says of the files at its top, by path.

    A checkpoint has nothing deeper that is read. Raises InputError for what the hub does not have, Unreachable when it
    does not answer.
    """
    from huggingface_hub.hf_api import RepoFile

    with hub.errors(repo, revision):
        api = hub.client()
        commit = revision if COMMIT.fullmatch(revision) else str(api.repo_info(repo, revision=revision).sha)
        tree = api.list_repo_tree(repo, revision=commit)
        return commit, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def wanted_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Of a commit's files, those that a conversion can need."""
    return {path: entry for path, entry in entries.items() if any(fnmatch(path, p) for p in WANTED)}


def _listing_problems(commit: str, names: Iterable[str]) -> Iterator[str]:
    """What makes fetching a commit pointless."""
    if not any(name.endswith(".safetensors") for name in names):
        others = ", ".join(name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".gguf"))
        yield f"{commit}: expected weights in *.safetensors, found {others or 'none'}; name a repo or commit that has them"


def _differences(folder: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Files that are missing, that nobody asked for, or whose length or digest is not the hub's."""
    for name in sorted({p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(wanted)):
        yield name, f"{name}: not in the hub's list"
    for name, entry in wanted.items():
        path = folder / name
        if not path.is_file():
            yield name, f"{name}: missing"
        elif path.stat().st_size != entry.size:
            yield name, f"{name}: expected {entry.size} bytes, found {path.stat().st_size}"
        elif entry.lfs and (found := files.digest(path)) != entry.lfs.sha256:
            yield name, f"{name}: expected sha256 {entry.lfs.sha256}, found {found}"
        elif not entry.lfs and (found := git_digest(path)) != entry.blob_id:
            yield name, f"{name}: expected git's {entry.blob_id}, found {found}"


def git_digest(path: Path) -> str:
    """The name that git gives to a file's bytes; the hub knows small files by it."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
