"""Order, shapes and shards of tensors are those of llama.cpp's tools."""

import pytest

from quant.llama.gguf import TensorSpec
from quant.llama.tensors import sort_tensors, split_into_shards, stored_shape
from quant.llama.types import TYPES
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((7,), (7,)),
        ((7, 1), (7,)),
        ((7, 2, 1, 1), (7, 2)),
        ((1, 1), (1,)),
        ((7, 1, 3), (7, 1, 3)),
        ((1,), (1,)),
    ],
)
def test_ones_at_the_end_of_a_shape_are_not_written(
    shape: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    assert stored_shape(TensorSpec("a.weight", shape, TYPES["F32"])) == stored


def test_tensors_are_sorted_by_block_number_and_then_by_name() -> None:
    names = [t.name for t in sort_tensors(list_tensors(load_model("glm-4.6")[0].architecture))]
    assert names[:4] == [
        "output.weight",
        "output_norm.weight",
        "token_embd.weight",
        "blk.0.attn_k.bias",
    ]
    blocks = [int(name.split(".")[1]) for name in names[3:]]
    assert blocks == sorted(blocks)


def test_a_shard_ends_before_the_tensor_that_would_exceed_its_limit() -> None:
    assert list(split_into_shards([4, 4, 2, 9, 1], 10)) == [[4, 4, 2], [9, 1]]
    assert list(split_into_shards([10, 10], 10)) == [[10], [10]]
