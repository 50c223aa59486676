"""What a hub's checkpoints have and transformers does not write: blocks that predict further tokens, and FP8 weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
BLOCK = 128
"""Rows and columns of a weight that share one scale."""


def add_prediction(folder: Path, *, own_embedding: bool, seed: int = 1) -> Path:
    """Give a checkpoint the MTP block of GLM's mixtures of experts: a decoder block and what joins it to the trunk."""
    config = read_config(folder)
    last, hidden, vocabulary = (
        config["num_hidden_layers"] - 1,
        config["hidden_size"],
        config["vocab_size"],
    )
    weights = load_file(folder / WEIGHTS)
    noise = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=noise)).to(torch.bfloat16)

    trunk, ahead = f"model.layers.{last}.", f"model.layers.{last + 1}."
    block = {
        ahead + name.removeprefix(trunk): random(*w.shape).to(w.dtype) if w.dim() > 1 else w.clone()
        for name, w in weights.items()
        if name.startswith(trunk)
    }
    joints = {"eh_proj": random(hidden, 2 * hidden)} | {
        name: torch.ones(hidden, dtype=torch.bfloat16)
        for name in ("enorm", "hnorm", "shared_head.norm")
    }
    if own_embedding:
        joints |= {
            name: random(vocabulary, hidden) for name in ("embed_tokens", "shared_head.head")
        }
    save(weights | block | {f"{ahead}{name}.weight": w for name, w in joints.items()}, folder)
    change_config(folder, num_nextn_predict_layers=1)
    return folder


def in_fp8(folder: Path) -> list[str]:
    """Store a checkpoint's linear layers as the hub's FP8 repos do: e4m3, one F32 scale a block; returns their names."""
    weights = load_file(folder / WEIGHTS)
    kept = (
        "eh_proj.weight",
        "indexer.weights_proj.weight",
    )  # on the hub, as embeddings, norms and routers
    linear = [name for name in weights if name.endswith("_proj.weight") and not name.endswith(kept)]
    for name in linear:
        scale = block_scales(weights[name])
        spread = spread_out(scale, weights[name].shape)
        weights[name] = (weights[name].float() / spread).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale
    save(weights, folder)
    method = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    change_config(folder, quantization_config=method)
    return linear


def dequantised(source: Path, folder: Path) -> Path:
    """The BF16 checkpoint that an FP8 one stands for, worked out here and not by the converter."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / WEIGHTS)
    for scale_name in [name for name in weights if name.endswith("_scale_inv")]:
        name, scale = scale_name.removesuffix("_scale_inv"), weights.pop(scale_name)
        weights[name] = (weights[name].float() * spread_out(scale, weights[name].shape)).to(
            torch.bfloat16
        )
    save(weights, folder)
    change_config(folder, quantization_config=None)
    return folder


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    """For each block of 128 x 128, or what is left of one at the edge, the scale that brings it into e4m3's range."""
    rows, columns = (-(-n // BLOCK) for n in weight.shape)
    scale = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            block = weight[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
            scale[r, c] = block.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
    return scale


def spread_out(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of every single weight."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    return dict(json.loads((folder / "config.json").read_text()))


def change_config(folder: Path, **changes: Any) -> None:
    """Replace keys of config.json, also inside its parts; None takes one away."""
    (folder / "config.json").write_text(
        json.dumps(merged(read_config(folder), changes), indent=2) + "\n"
    )


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with some keys replaced."""
    inside = {
        k: merged(config[k], v) for k, v in changes.items() if isinstance(v, dict) and k in config
    }
    return {k: v for k, v in (config | changes | inside).items() if v is not None}


def save(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the one file of weights."""
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
