"""Split a file into shards with llama-gguf-split, and merge shards; both verified by tensor.

The tool checks none of its reads and writes, so its exit code proves nothing. Every tensor's
sha256 before is compared with the one after.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.disk import find_space_problem
from quant.core.errors import CheckError, InputError, convert_disk_errors, raise_problems
from quant.core.files import Receipt
from quant.core.store import Store, StoredResult
from quant.llama.gguf import read_header, read_headers
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain
from quant.plan.plan import Plan
from quant.plan.recipe import parse_size


@dataclass(frozen=True)
class VariantFile:
    """One variant as it is published: one file, or shards of which llama.cpp loads the first."""

    plan: Plan
    file: ModelFile
    tensor_digests: Mapping[str, str]
    """The sha256 of each tensor's data."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """The relative weighted mean squared error of each tensor; empty if it was only split."""

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.plan.variant.name

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its file, or its shards in order."""
        return self.file.paths

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Length and sha256 of each path."""
        return self.file.receipts

    @property
    def bytes(self) -> int:
        """The length of all files together."""
        return self.file.bytes


def shard_base(
    base: ModelFile, plan: Plan, title: str, max_size: str, tools: Toolchain, store: Store
) -> VariantFile:
    """Return the base as a variant, in shards if it may be split and does not fit one shard.

    The other variants need no such step: the engine writes them in shards.

    Args:
        base: The BF16 file.
        plan: The plan of the BF16 variant.
        title: The model's name in file names.
        max_size: The size of the largest shard, such as ``50G``.
        tools: Has llama-gguf-split.
        store: Keeps the shards.

    Raises:
        InputError: A tensor fits no shard.
        CheckError: The bytes of a tensor changed.
        ToolError: llama-gguf-split failed.
    """
    variant = plan.variant
    split = variant.split and base.bytes > parse_size(max_size)
    stem = f"{title}-{variant.name}"
    inputs = {
        "file": base.digest,
        "stem": stem,
        "max_size": max_size if split else None,
        "llama.cpp": str(tools.version),
    }
    stored = store.run_once(
        "shard",
        inputs,
        lambda partial: split_file(base.path, max_size if split else None, tools, partial / stem),
    )
    return make_variant_file(plan, stored, digests=stored.facts["tensors"])


def make_variant_file(
    plan: Plan,
    stored: StoredResult,
    *,
    digests: Mapping[str, str],
    errors: Mapping[str, float] | None = None,
) -> VariantFile:
    """Return the variant that a finished folder of the store holds."""
    receipts = tuple(r for r in stored.receipts if r.path.endswith(".gguf"))
    file = ModelFile(tuple(stored.path(r.path) for r in receipts), receipts)
    return VariantFile(plan=plan, file=file, tensor_digests=digests, errors=errors or {})


def split_file(path: Path, max_size: str | None, tools: Toolchain, stem: Path) -> dict[str, Any]:
    """Split a file into shards named ``STEM-0000N-of-0000M.gguf``.

    Args:
        path: The file to split.
        max_size: The size of the largest shard. None gives the file a second name, STEM.gguf.
        tools: Has llama-gguf-split.
        stem: The path of the shards without their suffixes. Its folder must hold no other GGUF.

    Returns:
        ``tensors``: the sha256 of each tensor.

    Raises:
        InputError: A tensor is larger than a shard.
        CheckError: The bytes of a tensor changed.
        ToolError: llama-gguf-split failed.
    """
    header = read_header(path)
    if max_size:
        raise_problems(
            f"{path}: tensor {t.name}: expected at most {max_size} a shard, found {t.bytes} bytes"
            for t in header.tensors
            # llama-gguf-split's M and G are powers of 1000, as parse_size has them.
            if t.bytes > parse_size(max_size)
        )
    expected = header.hash_tensors()
    # A hard link where the file system allows: the base may have hundreds of gigabytes.
    if max_size is None:
        files.link_or_copy(path, stem.with_name(f"{stem.name}.gguf"))
        return {"tensors": expected}
    tools.run(
        "llama-gguf-split",
        ["--split", "--split-max-size", max_size, path, stem.name],
        cwd=stem.parent,
        log=stem.parent / "log",
    )
    written = sorted(stem.parent.glob("*.gguf"))
    if not written:
        raise CheckError(f"{stem.parent}: expected shards, found none; llama-gguf-split wrote none")
    read_headers(written[0])  # checks that all shards are there, with the same count
    if wrong := list(find_changed_tensors(expected, _read_digests(written), stem.parent)):
        raise CheckError(*wrong)
    return {"tensors": expected}


def merge_shards(first: Path, out: Path, tools: Toolchain) -> Receipt:
    """Merge all shards beside ``first`` into one file. The shards stay.

    Args:
        first: The first shard.
        out: The file to write; it must not exist.
        tools: Has llama-gguf-split.

    Returns:
        The length and sha256 of the file.

    Raises:
        InputError: A shard is missing, the shards do not belong together, ``out`` exists, or the
            disk is too small.
        CheckError: The bytes of a tensor changed.
        ToolError: llama-gguf-split failed.
    """
    headers = read_headers(first)
    if len(headers) == 1:
        raise InputError(
            f"{first}: expected the first shard of a split (…-00001-of-0000N.gguf), "
            "found a whole file"
        )
    if out.exists():
        raise InputError(f"{out}: exists already; name another file or remove it")
    # Asked before anything is read: a merge of hundreds of gigabytes must not end on a full disk.
    needed = sum(h.path.stat().st_size for h in headers)
    purpose = " for the merged file beside its shards"
    if problem := find_space_problem(out, needed, purpose=purpose):
        raise InputError(problem)
    expected = _read_digests([h.path for h in headers])
    partial = out.with_name(out.name + files.PARTIAL)
    log = out.with_name(out.name + ".log")
    with convert_disk_errors(partial):
        out.parent.mkdir(parents=True, exist_ok=True)
        files.remove(partial)
        try:
            tools.run(
                "llama-gguf-split",
                ["--merge", first.resolve(), partial.resolve()],
                cwd=out.parent,
                log=log,
            )
            if wrong := list(
                find_changed_tensors(expected, read_header(partial).hash_tensors(), partial)
            ):
                raise CheckError(*wrong)
            files.flush_file(partial)
            partial.replace(out)
        finally:
            files.remove(partial)
            files.remove(log)
        files.flush_folder(out.parent)
    return files.make_receipt(out, out.parent)


def find_changed_tensors(
    before: Mapping[str, str], after: Mapping[str, str], where: Path
) -> Iterator[str]:
    """Yield every tensor that changed, is missing or is new, by its sha256 before and after."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield (
                f"{where}: tensor {name}: expected sha256 {before.get(name)}, "
                f"found {after.get(name)}"
            )


def _read_digests(paths: Sequence[Path]) -> dict[str, str]:
    return {name: sha for path in paths for name, sha in read_header(path).hash_tensors().items()}
