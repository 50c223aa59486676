"""What a GGUF file says of a GLM-4.x with experts, as far as reading it by torch needs it. Pure."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from quant.calibration.gradients import ARCHITECTURES
from quant.llama.tensors import TOKEN_EMBEDDING

SIGMOID = 2
"""Of ``expert_gating_func``: LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID."""
ONLY = {"expert_gating_func": SIGMOID, "expert_group_count": 1, "rope.scaling.type": "none"}
"""What a model may say of itself, if it says anything of it."""
FURTHER = "nextn_predict_layers"
KEYS = {
    "blocks": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "key": "attention.key_length",
    "value": "attention.value_length",
    "rotated": "rope.dimension_count",
    "theta": "rope.freq_base",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "width": "embedding_length",
    "experts": "expert_count",
    "used": "expert_used_count",
    "dense": "leading_dense_block_count",
    "scale": "expert_weights_scale",
    "norm": "expert_weights_norm",
}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model."""

    blocks: int
    """Of the trunk: those that predict further tokens are not counted."""
    heads: int
    kv_heads: int
    key: int
    """Numbers of a head's key."""
    value: int
    rotated: int
    """Of these, how many turn with the place."""
    theta: float
    epsilon: float
    width: int
    experts: int
    used: int
    dense: int
    """Blocks without experts, at the beginning."""
    scale: float
    """What the shares of a token's experts are multiplied with."""
    norm: bool
    """Whether these shares add up to one before."""

    @staticmethod
    def of(metadata: Mapping[str, Any]) -> "ModelShape":
        """As the metadata of a file has it, in which nothing is :func:`unknown`."""
        told = {f.name: metadata[f"glm4moe.{KEYS[f.name]}"] for f in fields(ModelShape)}
        trunk = told["blocks"] - metadata.get(f"glm4moe.{FURTHER}", 0)
        return ModelShape(**told | {"blocks": trunk, "scale": told["scale"] or 1.0})


def find_shape_problems(metadata: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """All for which a model cannot be read backward: by its metadata, and by the names of its tensors."""
    if (architecture := metadata.get("general.architecture")) not in ARCHITECTURES:
        yield f"general.architecture: expected {' or '.join(ARCHITECTURES)}, found {architecture}"
        return
    problems = [*_strange(metadata)]
    yield from problems
    if not problems and (
        missing := [n for n in _needed(ModelShape.of(metadata)) if n not in names]
    ):
        yield f"{missing[0]}: expected a tensor, found none, and so {len(missing)} in all"


def _strange(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that are missing or none, and what is not known."""
    for f in fields(ModelShape):
        key, kind = f"glm4moe.{KEYS[f.name]}", f.type
        found: Any = metadata.get(key)
        if type(found) is not kind or found < 0:
            yield f"{key}: expected {'true or false' if kind is bool else 'a number'}, found {found}"
    for name, expected in ONLY.items():
        if (found := metadata.get(f"glm4moe.{name}", expected)) != expected:
            yield f"glm4moe.{name}: expected {expected}, found {found}"
    blocks, further = metadata.get("glm4moe.block_count", 0), metadata.get(f"glm4moe.{FURTHER}", 0)
    if type(further) is not int or (type(blocks) is int and not 0 <= further < blocks):
        yield f"glm4moe.{FURTHER}: expected fewer than the {blocks} blocks, found {further}"


def _needed(shape: ModelShape) -> Iterator[str]:
    """The tensors that every such model has."""
    yield from (TOKEN_EMBEDDING, "output_norm.weight")
    for n in range(shape.blocks):
        yield from (
            f"blk.{n}.{part}.weight" for part in ("attn_norm", "post_attention_norm", "attn_output")
        )
        yield from (f"blk.{n}.attn_{part}.weight" for part in "qkv")
        kinds = ("",) if n < shape.dense else ("_exps", "_shexp")
        yield from (
            f"blk.{n}.ffn_{part}{kind}.weight" for part in ("gate", "up", "down") for kind in kinds
        )
        if n >= shape.dense:
            yield f"blk.{n}.ffn_gate_inp.weight"
