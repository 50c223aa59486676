"""Lay out a release: folders and names, model card, Ollama files, checksums, and the manifest, which is written last.

Everything here is the same for the same inputs. What may differ between two runs (times, paths, the machine, what the
model said) goes into the run's record beside the release, never into it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from quant.calibration import held_out
from quant.calibration.imatrix import ImportanceMatrix
from quant.calibration.text import CalibrationText
from quant.chat.go_template import load_go_template
from quant.chat.scenarios import Scenarios
from quant.chat.template import ChatTemplate
from quant.chat.verdict import SmokeResult
from quant.core import files
from quant.core.files import Receipt
from quant.core.format import hash_text, to_pretty_json
from quant.core.store import Store
from quant.errors import raise_problems
from quant.evaluate import html
from quant.evaluate.figures import format_figures
from quant.evaluate.release import ReleaseEvaluation
from quant.hub.checkpoint import Checkpoint
from quant.llama.model_file import ModelFile
from quant.plan import inventory
from quant.plan.plan import Plan
from quant.plan.recipe import ModelRecipe
from quant.plan.sizes import estimate_memory
from quant.quantize.shard import VariantFile
from quant.release import card
from quant.release import modelfile as modelfiles
from quant.release.card import single_file, smoke_words
from quant.release.ollama import params_problems
from quant.release.provenance import SHAPING, make_statement

MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
PROVENANCE = "provenance.json"
FORMAT = "gguf-foundry release 3"


@dataclass(frozen=True)
class ReleaseInputs:
    """Everything that went into a release, stage by stage."""

    model: ModelRecipe
    checkpoint: Checkpoint
    template: ChatTemplate | None
    base: ModelFile
    vision: ModelFile | None
    """The part that sees, for models that do."""
    text: CalibrationText
    matrix: ImportanceMatrix
    variants: tuple[tuple[VariantFile, SmokeResult], ...]
    llama_cpp: str
    tools: Mapping[str, Any]
    """How llama.cpp was built."""
    scenarios: Scenarios
    """What the smoke tests tried beside the model's own conversation."""
    figures: ReleaseEvaluation | None = None
    """How good the files are, where that was measured."""


@dataclass(frozen=True)
class Release:
    """A finished release folder."""

    folder: Path
    name: str
    manifest: Mapping[str, Any]
    receipts: tuple[Receipt, ...]


def package_release(made: ReleaseInputs, store: Store) -> Release:
    """The release as a folder in the store; large files are second names of the stages' files."""
    raise_problems(params_problems(ollama_params(made.model)))
    render_modelfile(made.model, made.model.title)  # refused now, if it cannot be written
    manifest = _manifest(made)
    versions = package_versions()
    inputs = {**manifest, "packages": versions, "tools": dict(made.tools)}
    done = store.run_once(
        "package", inputs, lambda partial: _lay_out(made, manifest, versions, partial)
    )
    return Release(done.folder, made.model.title, manifest, done.receipts)


def place_files(sharded: VariantFile) -> dict[str, Path]:
    """Where each file of a variant goes in a release: single files at the root, shards in a folder of their own."""
    folder = f"{sharded.name}/" if len(sharded.paths) > 1 else ""
    return {f"{folder}{path.name}": path for path in sharded.paths}


def ollama_params(model: ModelRecipe) -> dict[str, Any]:
    """``params`` as Ollama reads it from a hub repo; everything said, because its own defaults have changed before."""
    return asdict(model.sampling) | {
        "num_ctx": model.ollama.num_ctx,
        "stop": list(model.ollama.stop),
    }


def render_modelfile(model: ModelRecipe, file: str) -> str:
    """A Modelfile for one unsplit file of a model."""
    return modelfiles.format_modelfile(file, ollama_params(model), model.ollama.system)


def _lay_out(
    made: ReleaseInputs, manifest: Mapping[str, Any], versions: Mapping[str, str], partial: Path
) -> dict[str, Any]:
    for sharded, _ in made.variants:
        for name, path in place_files(sharded).items():
            files.link_or_copy(path, partial / name)
    for file in (made.matrix, made.vision):
        if file:
            files.link_or_copy(file.path, partial / file.path.name)
    files.write_text(partial / "README.md", card.render_card(made.model, manifest))
    if measured := html.list_report_files(manifest):
        pictures = html.draw_charts(measured, made.model.title)
        for name, (_, svg) in pictures.items():
            files.write_text(partial / html.PICTURES / name, svg)
        ppl = manifest["evaluation"]["base"]["ppl"]
        left_out = held_out.describe_short_kinds(manifest["evaluation"]["too_short"])
        notes = [*list_warnings(manifest), *([left_out] if left_out else [])]
        told = html.render_report(measured, made.model.title, ppl, notes)
        files.write_text(partial / html.REPORT, told)
    files.write_text(partial / "params", to_pretty_json(ollama_params(made.model)))
    if made.model.ollama.system:
        files.write_text(partial / "system", made.model.ollama.system)
    if made.template:
        files.write_text(partial / "chat_template.jinja", made.template.text)
    if go := load_go_template(made.model.template):
        files.write_text(partial / "template", go)
    if single := single_file(manifest["variants"]):
        files.write_text(
            partial / "Modelfile", render_modelfile(made.model, single["files"][0]["path"])
        )
    _write_lists(partial, manifest, versions, made.tools)
    return {"variants": len(made.variants)}


def package_versions() -> dict[str, str]:
    """The versions here of the packages that can change a byte of a release, and the project's own."""
    return {name: metadata.version(name) for name in ("gguf-foundry", *SHAPING)}


def _write_lists(
    partial: Path,
    manifest: Mapping[str, Any],
    versions: Mapping[str, str],
    tools: Mapping[str, Any],
) -> None:
    """Provenance and SHA256SUMS of everything before them, then the manifest, whose presence means that all is there."""
    known = {f["path"]: f["sha256"] for v in manifest["variants"] for f in v["files"]}
    paths = {
        p.relative_to(partial).as_posix(): p for p in sorted(partial.rglob("*")) if p.is_file()
    }
    sums = {name: known.get(name) or files.hash_file(path) for name, path in paths.items()}
    text = to_pretty_json(manifest)
    others = {name: version for name, version in versions.items() if name != "gguf-foundry"}
    subjects = {**sums, MANIFEST: hash_text(text)}
    said = to_pretty_json(
        make_statement(manifest, subjects, others, versions["gguf-foundry"], tools)
    )
    files.write_text(partial / PROVENANCE, said)
    sums = dict(sorted({**sums, PROVENANCE: hash_text(said)}.items()))
    files.write_text(partial / CHECKSUMS, "".join(f"{sha}  {name}\n" for name, sha in sums.items()))
    files.write_text(partial / MANIFEST, text)


def _manifest(made: ReleaseInputs) -> dict[str, Any]:
    waivers = {w.scenario: w.why for w in made.model.waivers}
    return {
        "format": FORMAT,
        "model": made.model.name,
        "recipe": asdict(made.model),
        "scenarios": asdict(made.scenarios),
        "source": {
            **made.checkpoint.origin,
            "files": [asdict(r) for r in made.checkpoint.receipts],
        },
        "llama.cpp": made.llama_cpp,
        "chat_template": _template(made.template, waivers) if made.template else None,
        "ollama_template": load_go_template(made.model.template),
        "calibration": made.text.json(),
        "imatrix": made.matrix.json(),
        "base": asdict(made.base.receipts[0]),
        "vision": asdict(made.vision.receipts[0]) if made.vision else None,
        "parameters": made.base.header.elements,
        "kv_bytes_per_token": kv_bytes_per_token(made.model),
        "evaluation": made.figures.json() if made.figures else None,
        "variants": [
            _variant(sharded, verdict, made.figures) for sharded, verdict in made.variants
        ],
    }


def kv_bytes_per_token(model: ModelRecipe) -> int:
    """Bytes of KV cache for a token of context, in F16; 0 when the recipe does not tell the model's numbers."""
    return (
        inventory.read_architecture(model.architecture).kv_bytes_per_token()
        if model.architecture
        else 0
    )


def _template(template: ChatTemplate, waivers: Mapping[str, str]) -> dict[str, Any]:
    patch = asdict(template.by) if template.by else None
    about = {"original_sha256": template.original_sha256, "sha256": template.sha256, "patch": patch}
    return about | {"waived": {name: waivers[name] for name in template.waived}}


def variant_entry(plan: Plan, listed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a manifest says of a variant before it was tried: its recipe, its sizes and its files."""
    needs = estimate_memory(plan, 0, 0)
    return {
        "name": plan.variant.name,
        "summary": plan.variant.summary,
        "bytes": sum(f["bytes"] for f in listed),
        "bpw": round(plan.bits_per_weight, 3),
        "bytes_by_type": plan.type_bytes(),
        "memory": {"weights": needs.weights, "experts": needs.experts},
        "recipe": asdict(plan.variant),
        "decided": sorted({t.rule for t in plan.tensors if t.rule is not None}),
        "files": list(listed),
    }


def _variant(
    sharded: VariantFile, verdict: SmokeResult, figures: ReleaseEvaluation | None
) -> dict[str, Any]:
    plan = sharded.plan
    placed = {path: name for name, path in place_files(sharded).items()}
    listed = [
        {"path": placed[path], "sha256": r.sha256, "bytes": r.bytes}
        for path, r in zip(sharded.paths, sharded.receipts, strict=True)
    ]
    return variant_entry(plan, listed) | {
        "tensors": {
            t.tensor.name: {"type": t.type.name, "sha256": sharded.tensor_digests[t.tensor.name]}
            for t in plan.tensors
        },
        "raised": {t.tensor.name: t.raised_from.name for t in plan.tensors if t.raised_from},
        "smoke": [
            {"name": s.name, "kind": s.kind, "passed": s.passed}
            | ({"waived": s.waived} if s.waived else {})
            for s in verdict.scenarios
        ],
        "evaluation": figures.files[sharded.name] if figures else None,
    }


def variants_table(manifest: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The release at a glance: variant, bytes, bits per weight, files, KLD, top-1, smoke verdict."""
    return [
        (
            v["name"],
            f"{v['bytes']:,}",
            f"{v['bpw']:.2f}",
            str(len(v["files"])),
            *format_figures(v["evaluation"])[1:],
            smoke_words(v["smoke"]),
        )
        for v in manifest["variants"]
    ]


def list_warnings(manifest: Mapping[str, Any]) -> Sequence[str]:
    """What is no fault and yet has to be known: files that smaller ones beat."""
    return [b["said"] for b in (manifest["evaluation"] or {}).get("beaten", ())]
