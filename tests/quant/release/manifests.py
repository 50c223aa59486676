"""Manifests for tests: complete, of no real model; a test replaces what it is about."""

from dataclasses import fields
from typing import Any

from quant.core.files import Receipt
from quant.plan.load import load_model
from quant.plan.recipe import Rule, Variant
from quant.release.manifest import (
    BaseFiguresRecord,
    CalibrationRecord,
    DomainFiguresRecord,
    EvaluationRecord,
    FiguresRecord,
    ImatrixCoverageRecord,
    ImatrixOriginRecord,
    ImatrixRecord,
    Manifest,
    MemoryRecord,
    ScenarioRecord,
    SourceRecord,
    TensorRecord,
    VariantRecord,
)

TINY = load_model("tiny-glm")[0]
RULE = Rule(tensors="a|b", type="Q4_K", why="It is\nso.")
PASSED = ScenarioRecord(name="4 turns", kind="protocol", passed=True)
SHARDS = tuple(f"Q/M-Q-{n:05d}-of-00003.gguf" for n in (1, 2, 3))


def make_variant(
    name: str,
    *paths: str,
    split: bool = True,
    rules: tuple[Rule, ...] = (RULE,),
    size: int = 10**6,
    kind: str = "Q4_K",
    **changes: Any,
) -> VariantRecord:
    """Return a variant whose files, of ``size`` bytes each, hold one tensor of type ``kind``."""
    values: dict[str, Any] = {
        "name": name,
        "summary": f"{name} is for tests.",
        "bytes": len(paths) * size,
        "bpw": 4.5,
        "bytes_by_type": {"Q4_K": 900, "F32": 100, "Q8_0": 1},
        "memory": MemoryRecord(weights=len(paths) * size, experts=500_000),
        "recipe": Variant(name, "For tests.", "Q4_K_M", rules, split),
        "decided": tuple(range(len(rules))),
        "files": tuple(Receipt(path, f"{n:064x}", size) for n, path in enumerate(paths, 1)),
        "tensors": {"t": TensorRecord(type=kind, sha256="0" * 64)},
        "raised": {},
        "smoke": (PASSED,),
        "evaluation": None,
    }
    return VariantRecord(**values | changes)


def make_manifest(**changes: Any) -> Manifest:
    """Return a manifest of three variants: the base, one unsplit file, one in shards."""
    values: dict[str, Any] = {
        "model": "tiny-glm",
        "recipe": TINY,
        "source": SourceRecord(folder="tiny-glm", files=()),
        "llama_cpp": "0.5.0 (abc)",
        "chat_template": None,
        "ollama_template": None,
        "calibration": CalibrationRecord(
            set="embedded",
            documents=321,
            tokens=1000,
            sha256="0" * 64,
            near_duplicates=0,
            held_out=10,
            sources=(),
            characters=4000,
            pieces=400,
            needless_cuts=0,
            held_out_sha256="0" * 64,
        ),
        "imatrix": ImatrixRecord(
            path="imatrix_tiny-glm.gguf",
            sha256="0" * 64,
            bytes=100,
            made_of=ImatrixOriginRecord(
                base="0" * 64,
                text="0" * 64,
                context=512,
                pass_chunks=4,
                llama_cpp="0.5.0 (abc)",
                chunks=2,
            ),
            coverage=ImatrixCoverageRecord(
                matrices=1, matrices_with_experts=0, least_tokens=1000, unvisited={}
            ),
        ),
        "base": Receipt("tiny-glm-BF16.gguf", "0" * 64, 10**7),
        "vision": None,
        "parameters": 10**6,
        "kv_bytes_per_token": 1000,
        "evaluation": None,
        "variants": (
            make_variant("BF16", *SHARDS, rules=()),
            make_variant("UD-TQ1_0", "M-UD-TQ1_0.gguf", split=False),
            make_variant("Q", *SHARDS),
        ),
    }
    return Manifest(**values | changes)


def make_figures(**changes: Any) -> FiguresRecord:
    """Return figures of a file."""
    values: dict[str, Any] = {
        "chunks": 8,
        "ppl": 12.34,
        "ppl_base": 11.0,
        "kld_mean": 0.0123,
        "kld_mean_low": 0.0113,
        "kld_mean_high": 0.0133,
        "kld_median": 0.01,
        "kld_p99": 0.1,
        "kld_p999": 0.2,
        "kld_max": 0.3,
        "top1": 0.931,
        "domains": {},
    }
    return FiguresRecord(**values | changes)


def make_domain_figures() -> DomainFiguresRecord:
    """Return figures of a file on one domain."""
    figures = make_figures()
    return DomainFiguresRecord(
        **{f.name: getattr(figures, f.name) for f in fields(DomainFiguresRecord)}
    )


def make_evaluation(**changes: Any) -> EvaluationRecord:
    """Return what the figures of a release have in common."""
    values: dict[str, Any] = {
        "context": 512,
        "top": 4096,
        "llama_cpp": "0.5.0 (abc)",
        "texts": {},
        "too_short": (),
        "base": BaseFiguresRecord(ppl=11.0, domains={}),
        "beaten": (),
    }
    return EvaluationRecord(**values | changes)
