"""What a file says of its model: everything that the reading does not know is told at once."""

from typing import Any

import pytest

from quant.calibration.gradients.shape import (
    KEYS,
    SIGMOID,
    ModelShape,
    _needed,
    find_shape_problems,
)

TOLD: dict[str, Any] = {f"glm4moe.{key}": n for n, key in enumerate(KEYS.values(), 7)} | {
    "general.architecture": "glm4moe",
    "glm4moe.rope.freq_base": 10000.0,
    "glm4moe.attention.layer_norm_rms_epsilon": 1e-5,
    "glm4moe.expert_weights_scale": 2.5,
    "glm4moe.expert_weights_norm": True,
    "glm4moe.expert_gating_func": SIGMOID,
    "glm4moe.expert_group_count": 1,
}
NAMES = {*_needed(ModelShape.of(TOLD))}


def test_blocks_that_predict_further_tokens_are_not_of_the_trunk() -> None:
    assert ModelShape.of(TOLD).blocks == TOLD["glm4moe.block_count"]
    further = TOLD | {"glm4moe.nextn_predict_layers": 2}
    assert ModelShape.of(further).blocks == TOLD["glm4moe.block_count"] - 2
    assert not [*find_shape_problems(further, NAMES)]
    assert ModelShape.of(TOLD).key == TOLD["glm4moe.attention.key_length"]


def test_a_scale_of_nothing_is_none() -> None:
    """As ``build_moe_ffn`` has it."""
    assert ModelShape.of(TOLD | {"glm4moe.expert_weights_scale": 0.0}).scale == 1


def test_another_architecture_is_all_that_is_told_of_it() -> None:
    assert [*find_shape_problems({"general.architecture": "llama"}, ())] == [
        "general.architecture: expected glm4moe, found llama",
    ]


STRANGE: dict[str, Any] = {
    "expert_gating_func": 1,
    "expert_group_count": 8,
    "rope.scaling.type": "yarn",
    "attention.head_count": [8, 8],
    "rope.freq_base": "10000",
    "expert_weights_norm": 1,
    "nextn_predict_layers": 7,
    "expert_used_count": -1,
}


def test_what_is_missing_or_not_known_is_told_at_once() -> None:
    broken = {k: v for k, v in TOLD.items() if k != "glm4moe.attention.key_length"}
    told = [
        *find_shape_problems(
            broken | {f"glm4moe.{key}": value for key, value in STRANGE.items()}, NAMES
        )
    ]
    assert len(told) == 1 + len(STRANGE)
    for key in ("attention.key_length", *STRANGE):
        assert [p for p in told if p.startswith(f"glm4moe.{key}: expected")], key


@pytest.mark.parametrize(
    "name", ["blk.7.ffn_up_shexp.weight", "blk.0.attn_q.weight", "output_norm.weight"]
)
def test_a_tensor_that_is_not_there_is_named(name: str) -> None:
    dense = TOLD | {"glm4moe.leading_dense_block_count": 1, "glm4moe.block_count": 8}
    names = {*_needed(ModelShape.of(dense))}
    assert "blk.0.ffn_up.weight" in names and "blk.0.ffn_up_exps.weight" not in names
    assert [*find_shape_problems(dense, names - {name})] == [
        f"{name}: expected a tensor, found none, and so 1 in all"
    ]
