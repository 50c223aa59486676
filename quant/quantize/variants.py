"""Quantize a base into every planned variant, in one pass over its weights, sharded on the way.

:func:`write_variants` is the pass itself. :func:`quantize_variants` is the stage of a build, which
keeps its work in the store. What was written is read back and compared with the plan: names,
shapes, types, order and length.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.calibration.imatrix import ImportanceMatrix
from quant.core.errors import CheckError, raise_problems
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.llama import ggml
from quant.llama.gguf import Header, read_headers
from quant.llama.model_file import ModelFile
from quant.llama.tensors import stored_shape
from quant.llama.toolchain import Toolchain
from quant.plan.plan import Plan
from quant.plan.recipe import parse_size
from quant.plan.sizes import MATRIX_NAME, find_oversized, forecast_file_bytes
from quant.quantize.engine.job import EngineJob, EngineSettings, VariantRequest, parse_reusable
from quant.quantize.engine.output import recover_record
from quant.quantize.engine.reuse import ReusableFile
from quant.quantize.engine.run import run_engine
from quant.quantize.gptq import REVISION
from quant.quantize.shard import VariantFile, make_variant_file

if TYPE_CHECKING:
    from quant.calibration.hessians import HessianResult

STAGE = "quantize"


@dataclass(frozen=True)
class QuantizeTarget:
    """A variant, and where to write it."""

    plan: Plan
    path: Path
    """The path of the whole file; shards are named after it."""
    max_size: str | None = None
    """The size of the largest shard, such as ``50G``; None leaves the file whole."""

    @property
    def request(self) -> VariantRequest:
        """What the engine needs to know of it."""
        return VariantRequest(
            path=self.path,
            types=self.plan.types(),
            file_type=self.plan.variant.file_type,
            max_bytes=parse_size(self.max_size) if self.max_size else None,
        )


@dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """One pass over a base: what it writes, and what the bytes depend on."""

    base: ModelFile
    """The BF16 file; its header is read once, however many variants there are."""
    targets: Sequence[QuantizeTarget]
    identity: str
    """Names the weights, the imatrix and the Hessians. Only what an interrupted run left under the
    same identity is continued."""
    tools: Toolchain
    imatrix: ModelFile | None = None
    """The importance matrix, a GGUF too; None for types that need none."""
    hessians: Path | None = None
    """Enables error compensation (GPTQ)."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    reusable: Sequence[ReusableFile] = ()
    """Files of earlier runs with the same inputs, whose tensors are copied."""


def write_variants(request: WriteRequest, folder: Path) -> list[dict[str, Any]]:
    """Write the files of all targets in one pass over the base.

    Args:
        request: What to write.
        folder: Holds the engine's job, log and status.

    Returns:
        For each target ``file_type``, ``files`` (names) and ``tensors``: the type, the sha256 and
        the relative weighted mean squared error of each.

    Raises:
        InputError: The base, the imatrix, a type or the disk does not allow it.
        CheckError: A file is not as planned.
        ToolError: ggml ended the engine's process.
    """
    imatrix = request.imatrix
    job = EngineJob(
        library=ggml.find_library(request.tools.bin),
        base=request.base.path,
        identity=request.identity,
        imatrix=imatrix.path if imatrix else None,
        imatrix_name=MATRIX_NAME,
        variants=tuple(t.request for t in request.targets),
        reusable=tuple(request.reusable),
        settings=request.settings,
        hessians=request.hessians,
    )
    records = run_engine(job, folder)
    problems: list[str] = []
    for t in request.targets:
        headers = read_headers(t.path.with_name(records[t.path]["files"][0]))
        # The length of one file can be forecast to the byte; shards repeat parts of the header.
        whole_bytes = None
        if imatrix and not t.max_size:
            whole_bytes = forecast_file_bytes(t.plan, request.base.header, imatrix.header)
        problems += find_differences(t.plan, headers, whole_bytes)
    if problems:
        raise CheckError(*problems)
    return [
        {
            "file_type": t.plan.variant.file_type,
            "files": records[t.path]["files"],
            "tensors": records[t.path]["tensors"],
        }
        for t in request.targets
    ]


def is_written(target: QuantizeTarget, identity: str) -> bool:
    """Return whether an earlier run with the same inputs has written the target already."""
    record = recover_record(target.path, identity)
    if record is None:
        return False
    return {name: t["type"] for name, t in record["tensors"].items()} == target.plan.types()


def find_differences(
    plan: Plan, headers: Sequence[Header], whole_bytes: int | None = None
) -> Iterator[str]:
    """Yield everything in which the files of a variant differ from its plan.

    Args:
        plan: The plan.
        headers: The headers of the variant's files, in their order.
        whole_bytes: The expected length of a variant of one file; None skips the check.
    """
    path = headers[0].path
    tensors = chain.from_iterable(h.tensors for h in headers)
    actual = {t.name: (stored_shape(t), t.type.name) for t in tensors}
    expected = {t.tensor.name: (stored_shape(t.tensor), t.type.name) for t in plan.tensors}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            yield (
                f"{path}: tensor {name}: expected {expected.get(name)}, found {actual.get(name)}"
            )
    if actual != expected:
        return
    # Dicts compare without order, so the order of tensors is compared apart.
    pairs = zip(expected, actual, strict=True)
    if moved := next((pair for pair in pairs if pair[0] != pair[1]), None):
        yield f"{path}: order of tensors: expected {moved[0]}, found {moved[1]}"
    if whole_bytes and (size := path.stat().st_size) != whole_bytes:
        yield f"{path}: expected {whole_bytes} bytes, found {size}"


# ---- The stage of a build


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """What the quantize stage of a build makes, and from what."""

    base: ModelFile
    imatrix: ImportanceMatrix
    plans: Sequence[Plan]
    """Plans of the base itself (BF16) are skipped."""
    title: str
    """The model's name in file names."""
    max_size: str
    """The size of the largest shard, such as ``50G``."""
    tools: Toolchain
    settings: EngineSettings = field(default_factory=EngineSettings)
    hessians: "HessianResult | None" = None
    """Enables error compensation (GPTQ)."""


def quantize_variants(request: StageRequest, store: Store) -> tuple[VariantFile, ...]:
    """Return the variants of the plans, and quantize those that the store does not hold.

    Args:
        request: The plans, and what they are made from.
        store: Holds finished variants. Their tensors are copied where a new plan needs them.

    Raises:
        InputError: A tensor fits no shard, weights are not finite, or the disk is full.
        CheckError: A file is not as planned.
        ToolError: ggml ended the engine's process.
    """
    plans = [p for p in request.plans if not p.is_base]
    raise_problems(line for p in plans for line in find_oversized(p, request.max_size))
    base, imatrix = request.base, ModelFile((request.imatrix.path,), (request.imatrix.receipt,))
    # The keys are part of the store's digests: another key, and every finished variant is lost.
    shared: dict[str, Any] = {
        "base": base.digest,
        "imatrix": request.imatrix.receipt.sha256,
        "llama.cpp": str(request.tools.version),
    }
    if request.hessians:
        # Older names of Hessians and GPTQ, kept because they are part of the digests.
        shared |= {"moments": request.hessians.receipt.sha256, "feedback": REVISION}
    inputs = [
        shared
        | {
            "types": p.types(),
            "file_type": p.variant.file_type,
            "name": f"{request.title}-{p.variant.name}",
            "max_size": _find_shard_size(p, request.max_size, base, imatrix),
        }
        for p in plans
    ]
    missing = [(p, i) for p, i in zip(plans, inputs, strict=True) if not store.find(STAGE, i)]
    targets = []
    for p, i in missing:
        # What an interrupted run left stays: the engine continues it by its journal.
        folder = store.begin(STAGE, i, keep_partial=True)
        targets.append(QuantizeTarget(p, folder / f"{i['name']}.gguf", i["max_size"]))
    if targets:
        write_request = WriteRequest(
            base=base,
            targets=targets,
            identity=to_canonical_json(shared),
            tools=request.tools,
            imatrix=imatrix,
            hessians=request.hessians.path if request.hessians else None,
            settings=request.settings,
            reusable=tuple(_list_reusable(shared, store)),
        )
        all_facts = write_variants(write_request, store.work_folder(STAGE))
        for (_, i), facts in zip(missing, all_facts, strict=True):
            store.commit(STAGE, i, facts)
    return tuple(_load(p, i, store) for p, i in zip(plans, inputs, strict=True))


def _find_shard_size(plan: Plan, max_size: str, base: ModelFile, imatrix: ModelFile) -> str | None:
    """Return the shard size of a variant that is sharded: it may be, and does not fit one shard."""
    whole = forecast_file_bytes(plan, base.header, imatrix.header)
    return max_size if plan.variant.split and whole > parse_size(max_size) else None


def _list_reusable(shared: Mapping[str, Any], store: Store) -> Iterator[ReusableFile]:
    """Yield every finished file of the same base, imatrix, Hessians and tools."""
    for inputs, stored in store.list_results(STAGE):
        # Files with Hessians hold all of `shared` of a build without: so they are compared.
        if shared.items() <= inputs.items() and inputs.get("moments") == shared.get("moments"):
            for name in stored.facts["files"]:
                yield parse_reusable(stored.path(name), stored.facts["tensors"])


def _load(plan: Plan, inputs: Mapping[str, Any], store: Store) -> VariantFile:
    stored = store.find(STAGE, inputs)
    assert stored, inputs["name"]
    tensors = stored.facts["tensors"]
    return make_variant_file(
        plan,
        stored,
        digests={name: t["sha256"] for name, t in tensors.items()},
        errors={name: t["error"] for name, t in tensors.items()},
    )
