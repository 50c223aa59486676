"""Read the hyperparameters of a GLM-4.x with experts from a GGUF's metadata. Pure."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from quant.calibration.gradients import ARCHITECTURES
from quant.llama.tensors import TOKEN_EMBEDDING

SIGMOID = 2
"""LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID, a value of ``expert_gating_func``."""
SUPPORTED = {"expert_gating_func": SIGMOID, "expert_group_count": 1, "rope.scaling.type": "none"}
"""Values of optional keys that the backward pass supports."""
MTP_BLOCKS = "nextn_predict_layers"
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
"""GGUF key of each field of :class:`ModelShape`, without the architecture."""


@dataclass(frozen=True)
class ModelShape:
    """The hyperparameters of a model."""

    blocks: int
    """Blocks of the trunk, without those that predict further tokens (MTP)."""
    heads: int
    kv_heads: int
    key: int
    """Features of a head's key."""
    value: int
    rotated: int
    """Features of a key with rotary embedding."""
    theta: float
    epsilon: float
    width: int
    experts: int
    used: int
    """Experts per token."""
    dense: int
    """Blocks without experts, at the beginning."""
    scale: float
    """Factor of the expert weights."""
    norm: bool
    """Whether the weights of a token's experts are normalized to a sum of one before that."""

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any]) -> "ModelShape":
        """Return the shape of a model without problems: see :func:`find_shape_problems`."""
        values = {f.name: metadata[f"glm4moe.{KEYS[f.name]}"] for f in fields(ModelShape)}
        blocks = values["blocks"] - metadata.get(f"glm4moe.{MTP_BLOCKS}", 0)
        # build_moe_ffn skips a scale of 0, so it is no scale.
        return ModelShape(**values | {"blocks": blocks, "scale": values["scale"] or 1.0})


def find_shape_problems(metadata: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """Yield everything for which a model cannot be run backward.

    Args:
        metadata: The GGUF's metadata.
        names: The names of its tensors.
    """
    if (architecture := metadata.get("general.architecture")) not in ARCHITECTURES:
        yield f"general.architecture: expected {' or '.join(ARCHITECTURES)}, found {architecture}"
        return
    problems = [*_find_metadata_problems(metadata)]
    yield from problems
    if problems:  # without a shape it is unknown which tensors there have to be
        return
    required = list_required_tensors(ModelShape.from_metadata(metadata))
    if missing := [name for name in required if name not in names]:
        yield f"{missing[0]}: expected a tensor, found none, and so {len(missing)} in all"


def list_required_tensors(shape: ModelShape) -> Iterator[str]:
    """Yield the names of the tensors that every model of this shape has."""
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


def _find_metadata_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield missing or invalid hyperparameters, and values that are not supported."""
    for f in fields(ModelShape):
        key, kind = f"glm4moe.{KEYS[f.name]}", f.type
        value: Any = metadata.get(key)
        # type() and not isinstance(): True is an int, and a list of head counts is no number.
        if type(value) is not kind or value < 0:
            expected_kind = "true or false" if kind is bool else "a number"
            yield f"{key}: expected {expected_kind}, found {value}"
    for name, expected in SUPPORTED.items():
        if (value := metadata.get(f"glm4moe.{name}", expected)) != expected:
            yield f"glm4moe.{name}: expected {expected}, found {value}"
    blocks = metadata.get("glm4moe.block_count", 0)
    mtp_blocks = metadata.get(f"glm4moe.{MTP_BLOCKS}", 0)
    if type(mtp_blocks) is not int or (type(blocks) is int and not 0 <= mtp_blocks < blocks):
        yield f"glm4moe.{MTP_BLOCKS}: expected fewer than the {blocks} blocks, found {mtp_blocks}"
