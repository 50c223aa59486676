"""Hyperparameters from metadata, and every problem at once for a model that is not supported."""

from typing import Any

import pytest

from quant.calibration.gradients.shape import (
    KEYS,
    SIGMOID,
    ModelShape,
    find_shape_problems,
    list_required_tensors,
)

METADATA: dict[str, Any] = {f"glm4moe.{key}": n for n, key in enumerate(KEYS.values(), 7)} | {
    "general.architecture": "glm4moe",
    "glm4moe.rope.freq_base": 10000.0,
    "glm4moe.attention.layer_norm_rms_epsilon": 1e-5,
    "glm4moe.expert_weights_scale": 2.5,
    "glm4moe.expert_weights_norm": True,
    "glm4moe.expert_gating_func": SIGMOID,
    "glm4moe.expert_group_count": 1,
}
NAMES = {*list_required_tensors(ModelShape.from_metadata(METADATA))}


def test_mtp_blocks_are_not_counted() -> None:
    assert ModelShape.from_metadata(METADATA).blocks == METADATA["glm4moe.block_count"]
    with_mtp = METADATA | {"glm4moe.nextn_predict_layers": 2}
    assert ModelShape.from_metadata(with_mtp).blocks == METADATA["glm4moe.block_count"] - 2
    assert not [*find_shape_problems(with_mtp, NAMES)]
    assert ModelShape.from_metadata(METADATA).key == METADATA["glm4moe.attention.key_length"]


def test_a_scale_of_zero_is_no_scale() -> None:
    """``build_moe_ffn`` skips a scale of zero."""
    assert ModelShape.from_metadata(METADATA | {"glm4moe.expert_weights_scale": 0.0}).scale == 1


def test_another_architecture_is_the_only_problem_listed() -> None:
    assert [*find_shape_problems({"general.architecture": "llama"}, ())] == [
        "general.architecture: expected glm4moe, found llama",
    ]


UNSUPPORTED: dict[str, Any] = {
    "expert_gating_func": 1,
    "expert_group_count": 8,
    "rope.scaling.type": "yarn",
    "attention.head_count": [8, 8],
    "rope.freq_base": "10000",
    "expert_weights_norm": 1,
    "nextn_predict_layers": 7,
    "expert_used_count": -1,
}


def test_everything_missing_or_unsupported_is_listed_at_once() -> None:
    broken = {k: v for k, v in METADATA.items() if k != "glm4moe.attention.key_length"}
    problems = [
        *find_shape_problems(
            broken | {f"glm4moe.{key}": value for key, value in UNSUPPORTED.items()}, NAMES
        )
    ]
    assert len(problems) == 1 + len(UNSUPPORTED)
    for key in ("attention.key_length", *UNSUPPORTED):
        assert [p for p in problems if p.startswith(f"glm4moe.{key}: expected")], key


@pytest.mark.parametrize(
    "name", ["blk.7.ffn_up_shexp.weight", "blk.0.attn_q.weight", "output_norm.weight"]
)
def test_a_missing_tensor_is_named(name: str) -> None:
    dense = METADATA | {"glm4moe.leading_dense_block_count": 1, "glm4moe.block_count": 8}
    names = {*list_required_tensors(ModelShape.from_metadata(dense))}
    assert "blk.0.ffn_up.weight" in names and "blk.0.ffn_up_exps.weight" not in names
    assert [*find_shape_problems(dense, names - {name})] == [
        f"{name}: expected a tensor, found none, and so 1 in all"
    ]
