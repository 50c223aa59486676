"""The model cards of two planned models and of one that was evaluated, word by word.

``pytest --update-golden`` writes the cards anew.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.core.files import Receipt
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model, load_template_patch, load_variant
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import ModelRecipe, PublishRecipe, parse_size
from quant.plan.sizes import forecast_shard_bytes
from quant.release.card import render_card
from quant.release.inputs import count_kv_bytes, record_plan
from quant.release.manifest import (
    EvaluationRecord,
    FiguresRecord,
    Manifest,
    SourceRecord,
    TemplateRecord,
    to_plain,
    to_record,
)
from tests.quant.release.manifests import PASSED, make_evaluation, make_figures, make_manifest

FOLDER = Path(__file__).parent / "cards"


def plan_release(model: ModelRecipe) -> Manifest:
    """Return a manifest as it will be, without what only a build can tell."""
    tensors = list_tensors(model.architecture)
    repo, folder = model.source.repo, model.source.folder
    manifest = make_manifest(
        recipe=model,
        source=SourceRecord(
            repo=repo, revision="0" * 40 if repo else None, folder=folder, files=()
        ),
        llama_cpp="0.5.0",
        chat_template=TemplateRecord(
            original_sha256="", sha256="", patch=load_template_patch(model.template)
        ),
        kv_bytes_per_token=count_kv_bytes(model),
        ollama_template="there is one",
        variants=tuple(
            record_plan(p, forecast_files(model, p))
            for p in (make_plan(load_variant(v), tensors) for v in model.variants)
        ),
    )
    return replace(manifest, calibration=replace(manifest.calibration, documents=0))


def forecast_files(model: ModelRecipe, p: Plan) -> tuple[Receipt, ...]:
    shards = (
        forecast_shard_bytes(p, parse_size(model.max_shard_size)) if p.variant.split else (p.bytes,)
    )
    name = f"{model.title}-{p.variant.name}"
    if len(shards) == 1:
        return (Receipt(f"{name}.gguf", "", p.bytes + model.header_bytes),)
    heads = [model.header_bytes, *[0] * len(shards)]
    return tuple(
        Receipt(
            f"{p.variant.name}/{name}-{n:05d}-of-{len(shards):05d}.gguf", "", size + heads[n - 1]
        )
        for n, size in enumerate(shards, 1)
    )


@pytest.mark.parametrize("name", ["tiny-glm", "glm-4.6"])
def test_a_planned_card_is_as_it_was(name: str, pytestconfig: pytest.Config) -> None:
    model = load_model(name)[0]
    if name == "glm-4.6":
        model = replace(model, publish=PublishRecipe("somebody/GLM-4.6-GGUF"))
    compare(render_card(model, plan_release(model)), FOLDER / f"{name}.md", pytestconfig)


def test_a_card_with_figures_is_as_it_was(pytestconfig: pytest.Config) -> None:
    model = load_model("tiny-glm")[0]
    figures = json.loads((FOLDER / "tiny-glm-figures.json").read_text())
    manifest = plan_release(model)
    variants = tuple(
        replace(v, smoke=(PASSED,), evaluation=complete_figures(figures["variants"][v.name]))
        for v in manifest.variants
    )
    evaluation = complete_evaluation(figures["evaluation"])
    card = render_card(model, replace(manifest, evaluation=evaluation, variants=variants))
    compare(card, FOLDER / "tiny-glm-measured.md", pytestconfig)


def complete_figures(figures: dict[str, Any]) -> FiguresRecord:
    """Return figures of which the file has only what a card shows."""
    default = to_plain(make_figures())
    domains = {name: default | f for name, f in figures["domains"].items()}
    for domain in domains.values():
        del domain["domains"]
    return to_record(FiguresRecord, default | figures | {"domains": domains})


def complete_evaluation(evaluation: dict[str, Any]) -> EvaluationRecord:
    """Return an evaluation of which the file has only what a card shows."""
    gap = {"file": "", "by": "", "ladder": False} | dict.fromkeys(
        ("kld_mean", "kld_mean_low", "kld_mean_high"), 0.0
    )
    base = {"ppl": 0.0, "domains": {}} | evaluation["base"]
    beaten = [gap | b for b in evaluation["beaten"]]
    return to_record(
        EvaluationRecord,
        to_plain(make_evaluation()) | evaluation | {"base": base, "beaten": beaten},
    )


def compare(card: str, path: Path, pytestconfig: pytest.Config) -> None:
    """Compare a card with the golden one, or write it."""
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(card)
    assert path.exists(), f"{path}: missing; pytest --update-golden writes it"
    assert card.splitlines() == path.read_text().splitlines()
