"""The model cards of two models before anything is made, and of one that was measured. Whoever changes a word sees it.

``pytest --update-golden`` writes the cards anew.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.plan.inventory import list_tensors
from quant.plan.load import load_model, load_template_patch, load_variant
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import ModelRecipe, PublishRecipe, parse_size
from quant.plan.sizes import forecast_shard_bytes
from quant.release.card import render_card
from quant.release.package import kv_bytes_per_token, variant_entry

FOLDER = Path(__file__).parent / "cards"


def planned(model: ModelRecipe) -> dict[str, Any]:
    """A manifest as it will be, but for what only the work itself can tell."""
    tensors = list_tensors(model.architecture)
    patch = load_template_patch(model.template)
    replacements = [{"why": r.why} for r in patch.replacements]
    return {
        "source": {"repo": model.source.repo, "revision": "0" * 40}
        if model.source.repo
        else {"folder": "tiny-glm"},
        "llama.cpp": "0.5.0",
        "chat_template": {
            "sha256": "",
            "original_sha256": "",
            "patch": {"replacements": replacements},
        },
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "ollama_template": "there is one",
        "calibration": None,
        "variants": [
            variant_entry(p, files(model, p))
            for p in (make_plan(load_variant(v), tensors) for v in model.variants)
        ],
    }


def files(model: ModelRecipe, p: Plan) -> list[dict[str, Any]]:
    cut = (
        forecast_shard_bytes(p, parse_size(model.max_shard_size)) if p.variant.split else (p.bytes,)
    )
    name = f"{model.title}-{p.variant.name}"
    if len(cut) == 1:
        return [{"path": f"{name}.gguf", "bytes": p.bytes + model.header_bytes}]
    names = [
        f"{p.variant.name}/{name}-{n:05d}-of-{len(cut):05d}.gguf" for n in range(1, len(cut) + 1)
    ]
    heads = [model.header_bytes, *[0] * len(cut)]
    return [
        {"path": path, "bytes": b + head} for path, b, head in zip(names, cut, heads, strict=False)
    ]


@pytest.mark.parametrize("name", ["tiny-glm", "glm-4.6"])
def test_a_card_is_as_it_was(name: str, pytestconfig: pytest.Config) -> None:
    model = load_model(name)[0]
    model = (
        replace(model, publish=PublishRecipe("somebody/GLM-4.6-GGUF"))
        if name == "glm-4.6"
        else model
    )
    held(render_card(model, planned(model)), FOLDER / f"{name}.md", pytestconfig)


def test_a_card_with_figures_is_as_it_was(pytestconfig: pytest.Config) -> None:
    model = load_model("tiny-glm")[0]
    manifest, told = planned(model), json.loads((FOLDER / "tiny-glm-figures.json").read_text())
    heard = [{"name": "4 turns", "kind": "protocol", "passed": True}]
    variants = [
        v | {"smoke": heard, "evaluation": told["variants"][v["name"]]}
        for v in manifest["variants"]
    ]
    found = render_card(model, manifest | {"evaluation": told["evaluation"], "variants": variants})
    held(found, FOLDER / "tiny-glm-measured.md", pytestconfig)


def held(found: str, path: Path, pytestconfig: pytest.Config) -> None:
    """Compare a card with the one that is kept, or keep it."""
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"{path}: missing; pytest --update-golden writes it"
    assert found.splitlines() == path.read_text().splitlines()
