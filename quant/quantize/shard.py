"""Cut a file into shards with llama-gguf-split, and put shards together again; both are verified tensor by tensor.

The tool checks none of its reads and writes, so nothing is believed because it returned 0: every tensor's sha256 before
is compared with the one after.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.disk import find_space_problem
from quant.core.files import Receipt
from quant.core.store import Store, StoredResult
from quant.errors import CheckError, InputError, convert_disk_errors
from quant.llama.gguf import read_header, read_headers
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain
from quant.plan.plan import Plan
from quant.plan.recipe import parse_size


@dataclass(frozen=True)
class VariantFile:
    """One variant as it is published: one file, or shards of which llama.cpp is given the first."""

    plan: Plan
    file: ModelFile
    tensor_digests: Mapping[str, str]
    errors: Mapping[str, float] = field(default_factory=dict)
    """What each tensor lost when it was quantised, relative and weighted by the imatrix; nothing of what was only cut."""

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.plan.variant.name

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its file, or its shards in their order."""
        return self.file.paths

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Length and sha256 of each path."""
        return self.file.receipts

    @property
    def bytes(self) -> int:
        """Length of all files."""
        return self.file.bytes


def shard_base(
    base: ModelFile, plan: Plan, title: str, max_size: str, tools: Toolchain, store: Store
) -> VariantFile:
    """The BF16 file in shards of at most ``max_size``, or as it is when it fits one or its variant must not be split.

    Variants that are quantised come in shards already. Raises CheckFailed with every tensor whose bytes changed.
    """
    variant = plan.variant
    cut = variant.split and base.bytes > parse_size(max_size)
    stem = f"{title}-{variant.name}"
    inputs = {
        "file": base.digest,
        "stem": stem,
        "max_size": max_size if cut else None,
        "llama.cpp": str(tools.version),
    }
    done = store.run_once(
        "shard",
        inputs,
        lambda partial: split_file(base.path, max_size if cut else None, tools, partial / stem),
    )
    return make_sharded(plan, done, done.facts["tensors"])


def make_sharded(
    plan: Plan,
    done: StoredResult,
    tensor_digests: Mapping[str, str],
    errors: Mapping[str, float] | None = None,
) -> VariantFile:
    """What a finished folder of the store holds of a variant."""
    receipts = tuple(r for r in done.receipts if r.path.endswith(".gguf"))
    file = ModelFile(tuple(done.path(r.path) for r in receipts), receipts)
    return VariantFile(plan, file, tensor_digests, errors or {})


def split_file(path: Path, max_size: str | None, tools: Toolchain, stem: Path) -> dict[str, Any]:
    """Write shards of at most ``max_size`` as ``STEM-0000N-of-0000M.gguf``, or the one file STEM.gguf when none is given.

    The folder belongs to this work. Raises CheckFailed with every tensor whose bytes changed.
    """
    header = read_header(path)
    if max_size and (large := [t for t in header.tensors if t.bytes > parse_size(max_size)]):
        raise InputError(
            *(
                f"{path}: tensor {t.name}: expected at most {max_size} a shard, found {t.bytes} bytes"
                for t in large
            )
        )
    expected = header.hash_tensors()
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
        raise CheckError(
            f"{stem.parent}: expected shards, found none; llama-gguf-split said nothing of it"
        )
    read_headers(written[0])  # all shards are there and count alike
    if wrong := list(find_changed_tensors(expected, _digests(written), stem.parent)):
        raise CheckError(*wrong)
    return {"tensors": expected}


def merge_shards(first: Path, out: Path, tools: Toolchain) -> Receipt:
    """All shards beside ``first`` as one file at ``out``, with every tensor as it was.

    The shards stay. Raises InputError for shards that are missing or do not belong together, and where there is no room;
    CheckFailed when a tensor changed.
    """
    headers = read_headers(first)
    if len(headers) == 1:
        raise InputError(
            f"{first}: expected the first shard of a split (…-00001-of-0000N.gguf), found a whole file"
        )
    if out.exists():
        raise InputError(f"{out}: exists already; name another file or take it away")
    needed = sum(h.path.stat().st_size for h in headers)
    purpose = " for the merged file beside its shards"
    if problem := find_space_problem(out, needed, purpose=purpose):
        raise InputError(problem)
    expected = _digests([h.path for h in headers])
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
    """Every tensor whose bytes are not what they were."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{where}: tensor {name}: expected sha256 {before.get(name)}, found {after.get(name)}"


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    return {name: sha for path in paths for name, sha in read_header(path).hash_tensors().items()}
