"""Everything that went into a release, and the manifest of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.calibration.imatrix import ImportanceMatrix
from quant.calibration.text import CalibrationText
from quant.chat.go_template import load_go_template
from quant.chat.scenarios import Scenarios
from quant.chat.template import ChatTemplate
from quant.chat.verdict import SmokeResult
from quant.core.files import Receipt
from quant.evaluate.release import ReleaseEvaluation
from quant.hub.checkpoint import Checkpoint
from quant.llama.model_file import ModelFile
from quant.plan import inventory
from quant.plan.plan import Plan
from quant.plan.recipe import ModelRecipe
from quant.plan.sizes import estimate_memory
from quant.quantize.shard import VariantFile
from quant.release.manifest import (
    CalibrationRecord,
    EvaluationRecord,
    FiguresRecord,
    ImatrixRecord,
    Manifest,
    MemoryRecord,
    ScenarioRecord,
    SourceRecord,
    TemplateRecord,
    TensorRecord,
    VariantRecord,
    to_record,
)


@dataclass(frozen=True, kw_only=True)
class ReleaseInputs:
    """What the stages of a build made, for packaging."""

    model: ModelRecipe
    checkpoint: Checkpoint
    template: ChatTemplate | None
    base: ModelFile
    vision: ModelFile | None
    """The vision projector, for models that have one."""
    text: CalibrationText
    matrix: ImportanceMatrix
    variants: tuple[tuple[VariantFile, SmokeResult], ...]
    llama_cpp: str
    """The version of llama.cpp."""
    tools: Mapping[str, Any]
    """How llama.cpp was built."""
    scenarios: Scenarios
    """What the smoke tests ran beside the model's own conversation."""
    evaluation: ReleaseEvaluation | None = None
    """How good the files are, if that was measured."""


def make_manifest(inputs: ReleaseInputs) -> Manifest:
    """Return the manifest of a release."""
    model, evaluation = inputs.model, inputs.evaluation
    return Manifest(
        model=model.name,
        recipe=model,
        scenarios=inputs.scenarios,
        source=SourceRecord(**inputs.checkpoint.origin, files=inputs.checkpoint.receipts),
        llama_cpp=inputs.llama_cpp,
        chat_template=_record_template(inputs.template, model) if inputs.template else None,
        ollama_template=load_go_template(model.template),
        calibration=to_record(CalibrationRecord, inputs.text.json()),
        imatrix=to_record(ImatrixRecord, inputs.matrix.json()),
        base=inputs.base.receipts[0],
        vision=inputs.vision.receipts[0] if inputs.vision else None,
        parameters=inputs.base.header.elements,
        kv_bytes_per_token=count_kv_bytes(model),
        evaluation=to_record(EvaluationRecord, evaluation.json()) if evaluation else None,
        variants=tuple(_record_variant(file, smoke, evaluation) for file, smoke in inputs.variants),
    )


def record_plan(plan: Plan, files: tuple[Receipt, ...]) -> VariantRecord:
    """Return the record of a planned variant: recipe, sizes and files, and no results."""
    # Without a KV cache: it depends on the context, and the manifest has its bytes per token.
    memory = estimate_memory(plan, 0, 0)
    return VariantRecord(
        name=plan.variant.name,
        summary=plan.variant.summary,
        bytes=sum(f.bytes for f in files),
        bpw=round(plan.bits_per_weight, 3),
        bytes_by_type=plan.type_bytes(),
        memory=MemoryRecord(weights=memory.weights, experts=memory.experts),
        recipe=plan.variant,
        decided=tuple(sorted({t.rule for t in plan.tensors if t.rule is not None})),
        files=files,
        tensors={},
        raised={t.tensor.name: t.raised_from.name for t in plan.tensors if t.raised_from},
        smoke=(),
        evaluation=None,
    )


def place_files(variant: VariantFile) -> dict[str, Path]:
    """Return the files of a variant by their path in the release.

    A single file lies at the root, where Ollama finds it; shards lie in a folder of their own,
    which ``hf download --include 'NAME/*'`` takes.
    """
    folder = f"{variant.name}/" if len(variant.paths) > 1 else ""
    return {f"{folder}{path.name}": path for path in variant.paths}


def count_kv_bytes(model: ModelRecipe) -> int:
    """Return bytes of KV cache a token in F16; 0 if the recipe lacks the model's numbers."""
    if not model.architecture:
        return 0
    return inventory.read_architecture(model.architecture).kv_bytes_per_token()


def _record_template(template: ChatTemplate, model: ModelRecipe) -> TemplateRecord:
    reasons = {w.scenario: w.why for w in model.waivers}
    return TemplateRecord(
        original_sha256=template.original_sha256,
        sha256=template.sha256,
        patch=template.by,
        waived={name: reasons[name] for name in template.waived},
    )


def _record_variant(
    file: VariantFile, smoke: SmokeResult, evaluation: ReleaseEvaluation | None
) -> VariantRecord:
    names = {path: name for name, path in place_files(file).items()}
    files = tuple(
        Receipt(names[path], r.sha256, r.bytes)
        for path, r in zip(file.paths, file.receipts, strict=True)
    )
    return replace(
        record_plan(file.plan, files),
        tensors={
            t.tensor.name: TensorRecord(type=t.type.name, sha256=file.tensor_digests[t.tensor.name])
            for t in file.plan.tensors
        },
        smoke=tuple(
            # None instead of "": the manifest leaves None out.
            ScenarioRecord(name=s.name, kind=s.kind, passed=s.passed, waived=s.waived or None)
            for s in smoke.scenarios
        ),
        evaluation=to_record(FiguresRecord, evaluation.files[file.name]) if evaluation else None,
    )
