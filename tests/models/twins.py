"""Twins of large models: the same architecture and tensor names, small numbers, random weights.

A twin goes through every stage that its large sister goes through, in seconds; what it says means nothing.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and transformers take seconds to import: only who makes a model waits
    from transformers import PreTrainedModel

TINY_GLM = Path(__file__).parents[2] / "recipes" / "models" / "tiny-glm"
"""The trained tiny model; twins speak its tokens."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

DENSE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
EXPERTS = {
    "num_hidden_layers": 3,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 2,
}
GLM_EXPERTS = EXPERTS | {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    # The hub's files carry a layer for predicting several tokens ahead; transformers makes and saves none.
    "num_nextn_predict_layers": 0,
}
LATENT_ATTENTION = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    # Not 256: the heads keep the proportions that the large models have, so some rows allow fewer types, as theirs do.
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
}
ROTARY_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LATENT = {
    key: DENSE[key] for key in ("hidden_size", "intermediate_size", "max_position_embeddings")
} | LATENT_ATTENTION

VISION = {
    "depth": 2,
    "hidden_size": 256,
    "num_heads": 4,
    "intermediate_size": 512,
    "out_hidden_size": 256,
    "image_size": 56,
    "patch_size": 14,
}
VISION_TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
IMAGES = {
    "image_processor_type": "Glm4vImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": VISION["patch_size"],
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 3136, "longest_edge": 200704},
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # class: (model type, numbers)
    "Glm4MoeForCausalLM": (
        "glm4_moe",
        DENSE | GLM_EXPERTS | {"use_qk_norm": True, "attention_bias": True},
    ),
    "Glm4MoeLiteForCausalLM": ("glm4_moe_lite", LATENT | GLM_EXPERTS),
    "Glm4ForCausalLM": ("glm4", DENSE | {"attention_bias": True}),
    "Glm4vForConditionalGeneration": ("glm4v", DENSE | {"attention_bias": True}),
    "GlmMoeDsaForCausalLM": (
        "glm_moe_dsa",
        LATENT | GLM_EXPERTS | {"index_n_heads": 2, "index_head_dim": 128, "index_topk": 64},
    ),
    "LlamaForCausalLM": ("llama", DENSE),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        DENSE | EXPERTS | {"num_experts": 8, "norm_topk_prob": True},
    ),
}


def write_twin(
    folder: Path, architecture: str, *, seed: int = 0, shard_size: str = "1GB", **changes: Any
) -> Path:
    """Write a checkpoint of this architecture with random weights; ``changes`` replace numbers of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY_GLM / name, folder / name)
    model = random_model(architecture, seed, changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if architecture == "Glm4vForConditionalGeneration":
        (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2) + "\n")
    return folder


def random_model(architecture: str, seed: int, changes: dict[str, Any]) -> "PreTrainedModel":
    """A model in BF16 that differs from any other seed's in every matrix; the caller's own chance is left alone."""
    import torch
    import transformers

    model_type, numbers = ARCHITECTURES[architecture]
    config = configuration(model_type, numbers | changes)
    model_class = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class._from_config(config)
    for (
        parameter
    ) in model.parameters():  # the buffers, such as the routers' bias, stay in F32 as on the hub
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def configuration(model_type: str, numbers: dict[str, Any]) -> Any:
    """The configuration with the tiny tokenizer's vocabulary and special tokens."""
    from transformers import AutoConfig

    tokens = added_tokens()
    ends = [tokens[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    shared = {
        "eos_token_id": ends,
        "pad_token_id": ends[0],
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    numbers = {"vocab_size": max(tokens.values()) + 1, **shared, **numbers}
    vision: dict[str, Any] = {**VISION, **numbers.pop("vision_config", {})}
    if model_type != "glm4v":
        return AutoConfig.for_model(model_type, **numbers)
    rope = ROTARY_HALF | {"mrope_section": [2, 3, 3]}
    pictures = {key: tokens[token] for key, token in VISION_TOKENS.items()}
    return AutoConfig.for_model(
        model_type,
        text_config=numbers | {"rope_parameters": rope},
        vision_config=vision,
        **shared,
        **pictures,
    )


def added_tokens() -> dict[str, int]:
    """GLM's special tokens and tags by name; they are the last of the vocabulary."""
    listed = json.loads((TINY_GLM / "tokenizer.json").read_text())["added_tokens"]
    return {entry["content"]: entry["id"] for entry in listed}
