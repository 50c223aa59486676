"""Quantise the BF16 file into every planned variant, in one pass over its weights, cut into shards on the way.

What was written is read back and compared with the plan: names, shapes, types, order and length.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.calibration.imatrix import ImportanceMatrix
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.errors import CheckError, raise_problems
from quant.llama import ggml
from quant.llama.gguf import Header, read_header, read_headers
from quant.llama.model_file import ModelFile
from quant.llama.tensors import stored_shape
from quant.llama.toolchain import Toolchain
from quant.plan.plan import Plan
from quant.plan.recipe import parse_size
from quant.plan.sizes import MATRIX_NAME, find_oversized, forecast_file_bytes
from quant.quantize.engine.job import EngineJob, EngineSettings, TypeRequest
from quant.quantize.engine.output import WrittenFile, read_finished
from quant.quantize.engine.reuse import FinishedFile
from quant.quantize.engine.run import run_engine
from quant.quantize.gptq import REVISION
from quant.quantize.shard import VariantFile, make_sharded

if TYPE_CHECKING:
    from quant.calibration.hessians import HessianResult

STAGE = "quantize"


@dataclass(frozen=True)
class QuantizeTarget:
    """A variant and where it is written."""

    plan: Plan
    path: Path
    """Of the whole file; shards are called after it."""
    max_size: str | None = None
    """The largest shard, ``50G`` or the like; none leaves the file whole."""

    @property
    def wanted(self) -> TypeRequest:
        """What the engine is told of it."""
        limit = parse_size(self.max_size) if self.max_size else None
        return TypeRequest(self.path, self.plan.types(), self.plan.variant.file_type, limit)


def quantize_variants(
    base: ModelFile,
    matrix: ImportanceMatrix,
    plans: Sequence[Plan],
    title: str,
    max_size: str,
    tools: Toolchain,
    store: Store,
    settings: EngineSettings | None = None,
    moments: "HessianResult | None" = None,
) -> tuple[VariantFile, ...]:
    """The variants that plans describe, those that stand already included; a plan of the BF16 file itself is left out.

    With moments, rounding is fed back.

    Raises InputError for a shard that cannot hold a tensor, weights that are no numbers, and a full disk; ToolError
    when ggml ends its process; CheckFailed for a wrong result.
    """
    plans = [p for p in plans if not p.is_base]
    raise_problems(line for p in plans for line in find_oversized(p, max_size))
    shared: dict[str, Any] = {
        "base": base.digest,
        "imatrix": matrix.receipt.sha256,
        "llama.cpp": str(tools.version),
    }
    if moments:
        shared |= {"moments": moments.receipt.sha256, "feedback": REVISION}
    inputs = {
        p.variant.name: _inputs(shared, p, title, _limit(p, max_size, base, matrix)) for p in plans
    }
    todo = [p for p in plans if not store.find(STAGE, inputs[p.variant.name])]
    targets = []
    for p in todo:
        key = inputs[p.variant.name]
        folder = store.begin(STAGE, key, keep_partial=True)
        targets.append(QuantizeTarget(p, folder / f"{key['name']}.gguf", key["max_size"]))
    if targets:
        before = tuple(_finished(shared, store))
        facts = write_variants(
            base.path,
            matrix.path,
            targets,
            to_canonical_json(shared),
            tools,
            store.work_folder(STAGE),
            settings,
            before,
            moments.path if moments else None,
        )
        for p, said in zip(todo, facts, strict=True):
            store.commit(STAGE, inputs[p.variant.name], said)
    return tuple(_found(p, inputs[p.variant.name], store) for p in plans)


def write_variants(
    base: Path,
    matrix: Path | None,
    targets: Sequence[QuantizeTarget],
    identity: str,
    tools: Toolchain,
    folder: Path,
    settings: EngineSettings | None = None,
    before: Sequence[FinishedFile] = (),
    moments: Path | None = None,
) -> list[dict[str, Any]]:
    """Write the targets' files, and say of each which type, digest and loss its tensors have.

    ``identity`` names the weights, the imatrix and the moments, with which rounding is fed back; ``folder`` is for what is
    in work, ``before`` has tensors that need not be quantised again. Raises as :func:`quantize`.
    """
    job = EngineJob(
        ggml.find_library(tools.bin),
        base,
        identity,
        matrix,
        MATRIX_NAME,
        tuple(t.wanted for t in targets),
        tuple(before),
        settings or EngineSettings(),
        moments,
    )
    records = run_engine(job, folder)
    header = read_header(base)
    wrong: list[str] = []
    for t in targets:
        record = records[t.path]
        headers = read_headers(t.path.with_name(record["files"][0]))
        whole = (
            forecast_file_bytes(t.plan, header, read_header(matrix))
            if matrix and not t.max_size
            else None
        )
        wrong += find_differences(t.plan, headers, whole)
    if wrong:
        raise CheckError(*wrong)
    return [
        {
            "file_type": t.plan.variant.file_type,
            "files": records[t.path]["files"],
            "tensors": records[t.path]["tensors"],
        }
        for t in targets
    ]


def is_written(target: QuantizeTarget, identity: str) -> bool:
    """Whether an earlier run of the same inputs has written the target already."""
    record = read_finished(target.path, identity)
    return (
        record is not None
        and {n: t["type"] for n, t in record["tensors"].items()} == target.plan.types()
    )


def find_differences(
    plan: Plan, headers: Sequence[Header], whole_bytes: int | None = None
) -> Iterator[str]:
    """Everything in which the files of a variant are not the planned ones; shards may be of any length."""
    path = headers[0].path
    written = tuple(chain.from_iterable(h.tensors for h in headers))
    found = {t.name: (stored_shape(t), t.type.name) for t in written}
    expected = {t.tensor.name: (stored_shape(t.tensor), t.type.name) for t in plan.tensors}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{path}: tensor {name}: expected {expected.get(name)}, found {found.get(name)}"
    pairs = zip(expected, found, strict=False)
    if found == expected and (moved := next((pair for pair in pairs if pair[0] != pair[1]), None)):
        yield f"{path}: order of tensors: expected {moved[0]}, found {moved[1]}"
    if whole_bytes and found == expected and (size := path.stat().st_size) != whole_bytes:
        yield f"{path}: expected {whole_bytes} bytes, found {size}"


def _limit(plan: Plan, max_size: str, base: ModelFile, matrix: ImportanceMatrix) -> str | None:
    """The largest shard, for a variant that is to be cut and does not fit one."""
    whole = forecast_file_bytes(plan, base.header, read_header(matrix.path))
    return max_size if plan.variant.split and whole > parse_size(max_size) else None


def _inputs(
    shared: Mapping[str, Any], plan: Plan, title: str, max_size: str | None
) -> dict[str, Any]:
    name = f"{title}-{plan.variant.name}"
    about = {
        "types": plan.types(),
        "file_type": plan.variant.file_type,
        "name": name,
        "max_size": max_size,
    }
    return {**shared, **about}


def _finished(shared: Mapping[str, Any], store: Store) -> Iterator[FinishedFile]:
    """Every file that was made of the same weights and imatrix by the same tools."""
    for inputs, done in store.list_results(STAGE):
        if shared.items() <= inputs.items() and inputs.get("moments") == shared.get("moments"):
            tensors = {name: WrittenFile(**made) for name, made in done.facts["tensors"].items()}
            yield from (FinishedFile(done.path(name), tensors) for name in done.facts["files"])


def _found(plan: Plan, inputs: Mapping[str, Any], store: Store) -> VariantFile:
    done = store.find(STAGE, inputs)
    assert done, inputs["name"]
    told = done.facts["tensors"]
    return make_sharded(
        plan,
        done,
        {n: t["sha256"] for n, t in told.items()},
        {n: t["error"] for n, t in told.items()},
    )
