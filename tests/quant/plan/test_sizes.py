"""What a planned variant weighs: file to the byte, shards, KV cache and memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quant.llama.gguf import Header, TensorSpec, read_header
from quant.llama.tensors import tensor_class
from quant.llama.types import TYPES
from quant.plan.inventory import list_tensors, read_architecture
from quant.plan.load import load_model, load_variant
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import Rule, Variant
from quant.plan.sizes import (
    KVCache,
    estimate_memory,
    find_oversized,
    forecast_file_bytes,
    forecast_shard_bytes,
    read_kv_cache,
    summarize_classes,
)
from tests.gguf_files import LLAMA, Key, Tensor, key, write

RULES = Variant("V", "For tests.", "Q8_0", (Rule(".*", "Q8_0", "For tests."),))
BASE = [
    Tensor("b.weight", (64, 3), "BF16"),
    Tensor("a.weight", (32, 5, 2), "BF16"),
    Tensor("n_norm.weight", (7,), "F32"),
]
MADE = [Tensor("a.weight", (32, 5, 2), "Q8_0"), Tensor("b.weight", (64, 3), "Q8_0"), BASE[2]]
ALWAYS = [key("general.quantization_version", 2), key("general.file_type", 32)]
ABOUT = [key("quantize.imatrix.file", "imatrix.gguf"), key("quantize.imatrix.entries_count", 3)]
DATASET, CHUNKS = (
    key("quantize.imatrix.dataset", "calibration.txt"),
    key("quantize.imatrix.chunks_count", 9),
)
MATRIX = [key("imatrix.datasets", ["calibration.txt"]), key("imatrix.chunk_count", 9)]


def planned(base: Header) -> Plan:
    return make_plan(RULES, base.tensors)


def file(path: Path, tensors: Sequence[Tensor], *keys: Key) -> Header:
    return read_header(write(path, tensors, [*LLAMA, *keys]))


# What the base says beside the model's own keys, what the imatrix says, and what llama-quantize
# adds to the model's own.
CASES = [
    (ALWAYS, MATRIX, [*ALWAYS, *ABOUT, DATASET, CHUNKS]),
    ([], MATRIX, [*ALWAYS, *ABOUT, DATASET, CHUNKS]),
    (ALWAYS, [], [*ALWAYS, *ABOUT]),
    (ALWAYS, [key("imatrix.chunk_count", 0)], [*ALWAYS, *ABOUT]),
    (ALWAYS, MATRIX[:1], [*ALWAYS, *ABOUT, DATASET]),
    (ALWAYS, MATRIX[1:], [*ALWAYS, *ABOUT, CHUNKS]),
    (
        [*ALWAYS, *ABOUT, key("quantize.imatrix.dataset", "another")],
        MATRIX,
        [*ALWAYS, *ABOUT, DATASET, CHUNKS],
    ),
    (
        ALWAYS,
        [key("imatrix.datasets", ["x" * 200]), MATRIX[1]],
        [*ALWAYS, *ABOUT, key("quantize.imatrix.dataset", "x" * 127), CHUNKS],
    ),
]


@pytest.mark.parametrize(("before", "matrix", "after"), CASES)
@pytest.mark.parametrize("padding", range(0, 32, 5))
def test_a_forecast_is_the_length_of_the_file(
    before: list[Key], matrix: list[Key], after: list[Key], padding: int, tmp_path: Path
) -> None:
    shift = key(
        "shift", "." * padding
    )  # so that no wrong length hides in the padding behind the head
    base = file(tmp_path / "base.gguf", BASE, shift, *before)
    known = read_header(write(tmp_path / "matrix.gguf", [], matrix))
    made = file(tmp_path / "made.gguf", MADE, shift, *after)
    assert forecast_file_bytes(planned(base), base, known) == made.path.stat().st_size


def test_without_an_imatrix_one_of_this_project_is_assumed(tmp_path: Path) -> None:
    base = file(tmp_path / "base.gguf", BASE, *ALWAYS)
    matrix = read_header(write(tmp_path / "matrix.gguf", [], MATRIX))
    assert forecast_file_bytes(planned(base), base) == forecast_file_bytes(
        planned(base), base, matrix
    )


def test_the_base_is_as_long_as_its_file(tmp_path: Path) -> None:
    base = file(tmp_path / "base.gguf", BASE)
    assert (
        forecast_file_bytes(make_plan(load_variant("BF16"), base.tensors), base)
        == base.path.stat().st_size
    )


def test_a_shape_that_ends_in_ones_makes_a_shorter_head(tmp_path: Path) -> None:
    for padding in range(0, 32, 3):
        shift = key("shift", "." * padding)
        base = file(
            tmp_path / "base.gguf", [Tensor("a.weight", (32, 5, 1), "BF16")], shift, *ALWAYS
        )
        made = file(
            tmp_path / "made.gguf",
            [Tensor("a.weight", (32, 5), "Q8_0")],
            shift,
            *ALWAYS,
            *ABOUT,
            DATASET,
            CHUNKS,
        )
        assert forecast_file_bytes(planned(base), base) == made.path.stat().st_size


def test_shards_are_cut_before_the_limit_is_passed() -> None:
    tensors = [
        TensorSpec(f"blk.{n}.a.weight", (32, rows), TYPES["BF16"])
        for n, rows in enumerate((10, 6, 4, 100, 1, 15))
    ]
    whole = make_plan(load_variant("BF16"), tensors)
    assert forecast_shard_bytes(whole, 1280) == (1280, 6400, 1024)
    assert forecast_shard_bytes(whole, 10**9) == (whole.bytes,)


def test_a_tensor_larger_than_a_shard_is_reported_if_the_file_is_cut() -> None:
    tensors = [
        TensorSpec("a.weight", (1000, 1000), TYPES["BF16"]),
        TensorSpec("b.weight", (1000, 10), TYPES["BF16"]),
    ]
    cut = make_plan(load_variant("BF16"), tensors)
    assert list(find_oversized(cut, "1M")) == [
        "variant BF16: tensor a.weight: expected at most 1M a shard, found 2000000 bytes"
    ]
    assert list(find_oversized(cut, "3M")) == []
    whole = Plan(Variant("W", "x", "BF16", split=False), cut.tensors)
    assert list(find_oversized(whole, "1M")) == []


def test_a_class_is_a_name_without_its_block() -> None:
    assert tensor_class("blk.12.ffn_down_exps.weight") == "ffn_down_exps"
    assert tensor_class("blk.3.attn_q.bias") == "attn_q.bias"
    assert tensor_class("token_embd.weight") == "token_embd"


@pytest.mark.parametrize("variant", ["BF16", "UD-Q2_K_XL", "UD-TQ1_0"])
@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.6v-flash"])
def test_classes_and_memory_hold_every_byte(model: str, variant: str) -> None:
    whole = make_plan(load_variant(variant), list_tensors(load_model(model)[0].architecture))
    weights = sum(t.bytes for t in whole.tensors)
    assert sum(c.bytes for c in summarize_classes(whole)) == weights
    assert sum(c.count for c in summarize_classes(whole)) == len(whole.tensors)
    needs = estimate_memory(whole, 1000, 50)
    assert needs.whole == weights + 50_000
    assert needs.without_experts == needs.whole - needs.experts
    assert needs.experts == sum(
        c.bytes for c in summarize_classes(whole) if c.name.endswith("_exps")
    )
    assert (needs.experts > weights / 2) == (model == "glm-4.6")


# What the converter writes for the attention of recipes/models/glm-4.6.toml (conversion/glm.py).
GLM_4_6 = {
    "general.architecture": "glm4moe",
    "glm4moe.block_count": 93,
    "glm4moe.nextn_predict_layers": 1,
    "glm4moe.embedding_length": 5120,
    "glm4moe.attention.head_count": 96,
    "glm4moe.attention.head_count_kv": 8,
    "glm4moe.attention.key_length": 128,
    "glm4moe.attention.value_length": 128,
    "glm4moe.rope.dimension_count": 64,
}
# And for recipes/models/glm-4.7-flash.toml (conversion/deepseek.py): latent and rotary part as one
# head.
MTP = "deepseek2.nextn_predict_layers"
GLM_4_7_FLASH = {
    "general.architecture": "deepseek2",
    "deepseek2.block_count": 47,
    "deepseek2.embedding_length": 2048,
    "deepseek2.attention.head_count": 20,
    "deepseek2.attention.head_count_kv": 1,
    "deepseek2.attention.kv_lora_rank": 512,
    "deepseek2.attention.key_length": 576,
    "deepseek2.attention.value_length": 512,
    "deepseek2.rope.dimension_count": 64,
}


@pytest.mark.parametrize(
    ("model", "metadata", "expected"),
    [
        ("glm-4.6", GLM_4_6, 92 * 8 * (128 + 128) * 2),
        ("glm-4.7-flash", GLM_4_7_FLASH, 54_144),
        ("glm-4.7-flash", GLM_4_7_FLASH | {"deepseek2.block_count": 48, MTP: 1}, 54_144),
    ],
)
def test_recipe_and_file_agree_on_the_kv_cache(
    model: str, metadata: dict[str, Any], expected: int
) -> None:
    architecture = read_architecture(load_model(model)[0].architecture)
    assert architecture.kv_bytes_per_token() == expected
    assert read_kv_cache(metadata).bytes_per_token == expected


def test_a_file_may_give_its_kv_heads_layer_by_layer() -> None:
    by_layer = GLM_4_6 | {"glm4moe.attention.head_count_kv": [8] * 93}
    assert read_kv_cache(by_layer).bytes_per_token == 92 * 8 * (128 + 128) * 2


def test_heads_without_a_length_divide_the_hidden_size() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 4,
        "llama.embedding_length": 256,
        "llama.attention.head_count": 4,
    }
    expected = KVCache(layers=4, kv_heads=4, key_length=64, value_length=64)
    assert read_kv_cache(metadata) == expected
    assert read_kv_cache({}).bytes_per_token == 0
