"""Random models with odd dimensions are converted; every tensor must be the predicted one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quant.llama.gguf import Header, TensorSpec, read_header
from quant.plan.inventory import list_tensors, list_vision_tensors
from tests.models.checkpoints import add_prediction, change_config, read_config
from tests.models.conversion import convert
from tests.models.twins import write_twin

pytestmark = pytest.mark.tools

# No two numbers alike, so that no shape is right by chance.
ATTENTION = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
}
EXPERTS = {"moe_intermediate_size": 96, "n_routed_experts": 5, "num_hidden_layers": 3}
LATENT = EXPERTS | {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 56,
    "kv_lora_rank": 72,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 88,
}
INDEXER = {"index_n_heads": 4, "index_head_dim": 24}
VISION = {
    "depth": 3,
    "hidden_size": 80,
    "num_heads": 4,
    "intermediate_size": 208,
    "out_hidden_size": 192,
    "image_size": 70,
    "patch_size": 14,
    "spatial_merge_size": 2,
}
SEEING = ATTENTION | {"head_dim": 32, "vision_config": VISION}
"""Its class knows no width of heads but the hidden size shared among them."""


@dataclass(frozen=True)
class Case:
    """A model to convert."""

    architecture: str
    changes: dict[str, Any]
    prediction: str = "none"
    """Of further tokens: none, with the trunk's embedding (``shared``), or with its ``own``."""
    config: dict[str, Any] = field(default_factory=dict)
    """What to change in config.json once it is written."""


CASES = {
    "glm4moe": Case("Glm4MoeForCausalLM", ATTENTION | EXPERTS),
    "glm4moe, as 4.6": Case("Glm4MoeForCausalLM", ATTENTION | EXPERTS, "shared"),
    "glm4moe, as 4.7": Case("Glm4MoeForCausalLM", ATTENTION | EXPERTS, "own"),
    "glm4moe, as Air": Case(
        "Glm4MoeForCausalLM", ATTENTION | EXPERTS | {"use_qk_norm": False}, "own"
    ),
    "glm4moe without biases": Case(
        "Glm4MoeForCausalLM", ATTENTION | EXPERTS | {"attention_bias": False}, "shared"
    ),
    "glm4moe, tied, 2 dense, 2 shared": Case(
        "Glm4MoeForCausalLM",
        ATTENTION
        | EXPERTS
        | {"tie_word_embeddings": True, "first_k_dense_replace": 2, "n_shared_experts": 2},
    ),
    "deepseek2": Case("Glm4MoeLiteForCausalLM", LATENT),
    "deepseek2, as 4.7-Flash": Case("Glm4MoeLiteForCausalLM", LATENT, "own"),
    "deepseek2 with a shared head": Case("Glm4MoeLiteForCausalLM", LATENT, "shared"),
    "deepseek2, tied": Case(
        "Glm4MoeLiteForCausalLM", LATENT | {"tie_word_embeddings": True, "n_shared_experts": 2}
    ),
    "glm4": Case("Glm4ForCausalLM", ATTENTION),
    "glm4 without biases": Case("Glm4ForCausalLM", ATTENTION | {"attention_bias": False}),
    "glm4, tied": Case("Glm4ForCausalLM", ATTENTION | {"tie_word_embeddings": True}),
    "glm4 that says nothing of biases": Case(
        "Glm4ForCausalLM", ATTENTION, config={"attention_bias": None}
    ),
    "glm4v": Case("Glm4vForConditionalGeneration", SEEING),
    "glm4v that says less": Case(
        "Glm4vForConditionalGeneration",
        SEEING | {"tie_word_embeddings": True},
        config={"text_config": {"head_dim": None, "attention_bias": None}},
    ),
    "glm-dsa": Case("GlmMoeDsaForCausalLM", LATENT | INDEXER, config={"indexer_types": None}),
    "glm-dsa, as 5": Case(
        "GlmMoeDsaForCausalLM", LATENT | INDEXER, "shared", config={"indexer_types": None}
    ),
    "glm-dsa with its own head": Case("GlmMoeDsaForCausalLM", LATENT | INDEXER, "own"),
    "glm-dsa, as 5.2": Case(
        "GlmMoeDsaForCausalLM",
        LATENT
        | INDEXER
        | {"num_hidden_layers": 4, "indexer_types": ["full", "full", "shared", "full"]},
        "shared",
    ),
}


@dataclass(frozen=True)
class Conversion:
    """What a case's config.json says, and what the converter wrote."""

    config: dict[str, Any]
    text: Header
    vision: Header | None


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    """Every case."""
    root = tmp_path_factory.mktemp("converted")
    jobs = []
    for n, case in enumerate(CASES.values()):
        folder = write_case(case, root / str(n))
        parts = ("text", "vision") if "vision_config" in read_config(folder) else ("text",)
        jobs += [(part, folder, root / f"{n}-{part}.gguf") for part in parts]
    convert(jobs, root)
    return {
        name: Conversion(
            read_config(root / str(n)) | {"mtp_own_embedding": case.prediction == "own"},
            read_header(root / f"{n}-text.gguf"),
            read_header(path) if (path := root / f"{n}-vision.gguf").exists() else None,
        )
        for n, (name, case) in enumerate(CASES.items())
    }


def write_case(case: Case, folder: Path) -> Path:
    write_twin(folder, case.architecture, **case.changes)
    if case.prediction != "none":
        add_prediction(folder, own_embedding=case.prediction == "own")
    change_config(folder, **case.config)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_converter_writes_the_tensors_predicted_from_config_json(
    name: str, converted: dict[str, Conversion]
) -> None:
    case = converted[name]
    assert entries(list_tensors(case.config)) == entries(case.text.tensors)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("glm4v")])
def test_the_converter_writes_the_vision_part_predicted_from_config_json(
    name: str, converted: dict[str, Conversion]
) -> None:
    case = converted[name]
    assert case.vision
    assert entries(list_vision_tensors(case.config)) == entries(case.vision.tensors)
    assert case.vision.metadata["general.type"] == "mmproj"
    assert case.vision.metadata["clip.projector_type"] == "glm4v"


def test_text_only_models_have_no_vision_part(converted: dict[str, Conversion]) -> None:
    without = [name for name, case in converted.items() if not case.vision]
    assert len(without) == len(CASES) - 2
    assert not any(list_vision_tensors(converted[name].config) for name in without)


def entries(tensors: tuple[TensorSpec, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type by name; a name that comes twice would be lost, so it is refused."""
    found = {t.name: (t.shape, t.type.name) for t in tensors}
    assert len(found) == len(tensors)
    return found
