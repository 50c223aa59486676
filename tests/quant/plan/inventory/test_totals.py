"""Totals of real models, as published; and counts for random dimensions."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.core.errors import InputError
from quant.llama.gguf import TensorSpec, pad
from quant.plan.inventory import (
    count_parameters,
    find_architecture_problems,
    list_tensors,
    list_vision_tensors,
    read_architecture,
)
from quant.plan.inventory.config import ArchitectureConfig
from quant.plan.inventory.glm4 import Glm4
from quant.plan.inventory.glm4_moe import Glm4Moe
from quant.plan.inventory.mla import Glm4MoeLite, GlmMoeDsa
from quant.plan.load import load_model, load_variant
from quant.plan.plan import make_plan

AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "num_nextn_predict_layers": 1,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 151552,
    "attention_bias": True,
    "use_qk_norm": False,
    "tie_word_embeddings": False,
    "mtp_own_embedding": True,
}
GLM_5_2 = {"indexer_types": ["full" if n < 3 or n % 4 == 2 else "shared" for n in range(78)]}


def config(name: str) -> dict[str, Any]:
    """The numbers of a model's recipe, or of one that has none."""
    if name == "glm-4.5-air":
        return AIR
    if name == "glm-5.2":
        return load_model("glm-5")[0].architecture | GLM_5_2
    return load_model(name)[0].architecture


@pytest.mark.parametrize(
    ("model", "tensors", "weights", "bf16_bytes", "q8_bytes"),
    [
        ("glm-4.6", 1759, 356_785_898_816, 713_723_942_144, 379_308_479_744),
        ("glm-4.7", 1761, 358_337_791_296, 716_827_727_104, 380_957_365_504),
        ("glm-4.5-air", 803, 110_468_824_832, 220_988_046_336, 117_447_146_496),
        ("glm-4.7-flash", 868, 31_221_488_576, 62_455_836_416, 33_191_718_656),
        ("glm-5", 1809, 753_864_139_008, 1_508_000_891_904, 801_335_424_000),
        (
            "glm-5.2",
            1524,
            753_329_940_480,
            None,
            800_780_500_992 - 22 * 196_608 * 4 + 22 * 196_608 * 34 // 32,
        ),
        ("glm-4.6v-flash", 523, 9_400_279_040, 18_802_245_632, 9_990_275_072),
    ],
)
def test_a_real_model_has_as_many_tensors_weights_and_bytes_as_published(
    model: str, tensors: int, weights: int, bf16_bytes: int | None, q8_bytes: int
) -> None:
    found = list_tensors(config(model))
    assert (len(found), count_parameters(found)) == (tensors, weights)
    assert bf16_bytes is None or make_plan(load_variant("BF16"), found).bytes == bf16_bytes
    assert make_plan(load_variant("Q8_0"), found).bytes == q8_bytes


@pytest.mark.parametrize(
    ("model", "tensors", "weights"),
    [
        ("glm-4.6", 1736, 352_797_829_024),
        ("glm-4.7", 1736, 352_797_829_024),
        ("glm-4.5-air", 780, 106_852_251_264),
        ("glm-4.7-flash", 844, 29_943_393_920),
        ("glm-5", 1782, 743_911_218_432),
        ("glm-5.2", 1497, 743_377_019_904),
    ],
)
def test_without_its_mtp_block_a_model_has_as_many_as_published(
    model: str, tensors: int, weights: int
) -> None:
    found = list_tensors(config(model) | {"num_nextn_predict_layers": 0})
    assert (len(found), count_parameters(found)) == (tensors, weights)


def test_the_vision_part_has_as_many_tensors_weights_and_bytes_as_published() -> None:
    found = list_vision_tensors(config("glm-4.6v-flash"))
    assert (len(found), count_parameters(found)) == (182, 892_498_432)
    assert sum(pad(t.bytes) for t in found) == 1_786_947_584


SIZES = {  # GB as published, a GB being 10^9 bytes
    "UD-TQ1_0": 84,
    "UD-IQ1_S": 96,
    "UD-IQ1_M": 107,
    "UD-IQ2_XXS": 115,
    "UD-Q2_K_XL": 135,
    "UD-IQ3_XXS": 145,
    "UD-Q3_K_XL": 158,
    "UD-Q4_K_XL": 204,
    "UD-Q5_K_XL": 252,
}


@pytest.mark.parametrize("variant", SIZES)
def test_every_variant_of_glm_4_6_is_within_a_per_cent_of_the_published_size(variant: str) -> None:
    model, _ = load_model("glm-4.6")
    size = (
        make_plan(load_variant(variant), list_tensors(model.architecture)).bytes
        + model.header_bytes
    )
    assert size == pytest.approx(SIZES[variant] * 10**9, rel=0.01)


def test_every_published_size_is_of_a_variant_that_glm_4_6_is_released_in() -> None:
    assert SIZES.keys() <= set(load_model("glm-4.6")[0].variants)


def multiples(of: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most).map(lambda n: n * of)


COMMON = {
    "hidden_size": multiples(32, 20),
    "vocab_size": st.integers(1, 999),
    "num_hidden_layers": st.integers(1, 9),
    "num_attention_heads": st.integers(1, 8),
    "intermediate_size": multiples(8, 40),
    "tie_word_embeddings": st.booleans(),
}
GROUPED = {
    "num_key_value_heads": st.integers(1, 4),
    "head_dim": multiples(8, 16),
    "attention_bias": st.booleans(),
}
EXPERTS = {
    "moe_intermediate_size": multiples(8, 30),
    "n_routed_experts": st.integers(1, 9),
    "n_shared_experts": st.integers(1, 2),
    "first_k_dense_replace": st.integers(0, 3),
    "num_nextn_predict_layers": st.integers(0, 1),
    "mtp_own_embedding": st.booleans(),
}
RANKS = {
    "q_lora_rank": multiples(8, 20),
    "kv_lora_rank": multiples(8, 20),
    "qk_nope_head_dim": multiples(8, 20),
    "qk_rope_head_dim": multiples(8, 8),
    "v_head_dim": multiples(8, 20),
}
INDEXER = {"index_n_heads": st.integers(1, 8), "index_head_dim": multiples(8, 16)}

DENSE = st.builds(Glm4, **COMMON, **GROUPED)
MOE = st.builds(Glm4Moe, **COMMON, **GROUPED, **EXPERTS, use_qk_norm=st.booleans())
LITE = st.builds(Glm4MoeLite, **COMMON, **RANKS, **EXPERTS)
SPARSE = st.builds(GlmMoeDsa, **COMMON, **RANKS, **EXPERTS, **INDEXER)
ANY = st.one_of(DENSE, MOE, LITE, SPARSE)


def feed_forward(n: Glm4Moe | Glm4MoeLite | GlmMoeDsa) -> tuple[int, int]:
    """Return the number of tensors and weights without the attention."""
    h, v, e, ahead = n.hidden_size, n.vocab_size, n.n_routed_experts, n.num_nextn_predict_layers
    m, s = n.moe_intermediate_size, n.moe_intermediate_size * n.n_shared_experts
    ends = 3 - n.tie_word_embeddings
    blocks = n.num_hidden_layers + ahead
    dense = min(n.first_k_dense_replace, blocks)
    own = n.mtp_own_embedding
    count = ends + 3 * dense + 8 * (blocks - dense) + ahead * (4 + 2 * own)
    weights = (ends - 1) * v * h + h + 3 * dense * h * n.intermediate_size
    weights += (blocks - dense) * (h * e + e + 3 * e * h * m + 3 * h * s) + ahead * (
        2 * h * h + 3 * h + 2 * v * h * own
    )
    return count, weights


@given(MOE)
def test_glm4moe_has_as_many_tensors_and_weights_as_the_formula_says(n: Glm4Moe) -> None:
    count, weights = feed_forward(n)
    blocks = n.num_hidden_layers + n.num_nextn_predict_layers
    h, q, k = n.hidden_size, n.num_attention_heads * n.head_dim, n.num_key_value_heads * n.head_dim
    attention = (
        2 * h
        + 2 * h * q
        + 2 * h * k
        + n.attention_bias * (q + 2 * k)
        + 2 * n.use_qk_norm * n.head_dim
    )
    tensors = n.tensors()
    assert len(tensors) == count + blocks * (6 + 3 * n.attention_bias + 2 * n.use_qk_norm)
    assert count_parameters(tensors) == weights + blocks * attention


@given(st.one_of(LITE, SPARSE))
def test_latent_attention_has_as_many_tensors_and_weights_as_the_formula_says(
    n: Glm4MoeLite | GlmMoeDsa,
) -> None:
    count, weights = feed_forward(n)
    blocks = n.num_hidden_layers + n.num_nextn_predict_layers
    h, heads, ql, kl = n.hidden_size, n.num_attention_heads, n.q_lora_rank, n.kv_lora_rank
    keys = n.qk_nope_head_dim + n.qk_rope_head_dim
    attention = 2 * h + ql + kl + h * ql + ql * heads * keys + h * (kl + n.qk_rope_head_dim)
    attention += heads * kl * (n.qk_nope_head_dim + n.v_head_dim) + heads * n.v_head_dim * h
    indexer = 0
    if isinstance(n, GlmMoeDsa):
        indexer = n.index_head_dim * (2 + h + ql * n.index_n_heads) + h * n.index_n_heads
    tensors = n.tensors()
    assert len(tensors) == count + blocks * (10 + 5 * isinstance(n, GlmMoeDsa))
    assert count_parameters(tensors) == weights + blocks * (attention + indexer)


@given(DENSE)
def test_glm4_has_as_many_tensors_and_weights_as_the_formula_says(n: Glm4) -> None:
    h, q, k = n.hidden_size, n.num_attention_heads * n.head_dim, n.num_key_value_heads * n.head_dim
    ends = 3 - n.tie_word_embeddings
    block = (
        4 * h + 2 * h * q + 2 * h * k + n.attention_bias * (q + 2 * k) + 3 * h * n.intermediate_size
    )
    tensors = n.tensors()
    assert len(tensors) == ends + n.num_hidden_layers * (10 + 3 * n.attention_bias)
    assert (
        count_parameters(tensors) == (ends - 1) * n.vocab_size * h + h + n.num_hidden_layers * block
    )


@given(ANY)
def test_no_name_comes_twice_and_every_name_fits_ggml(n: ArchitectureConfig) -> None:
    names = [t.name for t in n.tensors()]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 63


@given(ANY)
def test_a_file_is_its_weights_and_less_than_a_padding_for_each_tensor(
    n: ArchitectureConfig,
) -> None:
    tensors = n.tensors()
    wide = sum(t.elements for t in tensors if t.type.name == "F32")
    exact = 2 * count_parameters(tensors) + 2 * wide
    size = make_plan(load_variant("BF16"), tensors).bytes
    assert exact <= size < exact + 32 * len(tensors)
    assert size % 32 == 0


@given(st.integers(0, 2**40), st.sampled_from([8, 32, 64]))
def test_padding_is_the_least_multiple_that_is_not_less(size: int, alignment: int) -> None:
    assert pad(size, alignment) % alignment == 0
    assert 0 <= pad(size, alignment) - size < alignment


@given(MOE)
def test_every_block_more_adds_the_same_tensors(n: Glm4Moe) -> None:
    def of_blocks(count: int) -> list[TensorSpec]:
        return list(replace(n, num_hidden_layers=count, num_nextn_predict_layers=0).tensors())

    sizes = [len(of_blocks(4 + more)) for more in range(3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


BROKEN = [  # what is wrong with GLM-4.6's numbers          what is said of it
    ({"hidden_size": None}, "hidden_size: missing; Glm4Moe needs it"),
    (
        {"hidden_size": "5120"},
        "hidden_size: expected a whole number from 1 to 2147483647, found '5120'",
    ),
    ({"hidden_size": 0}, "hidden_size: expected a whole number from 1 to 2147483647, found 0"),
    (
        {"hidden_size": 5120.0},
        "hidden_size: expected a whole number from 1 to 2147483647, found 5120.0",
    ),
    (
        {"hidden_size": True},
        "hidden_size: expected a whole number from 1 to 2147483647, found True",
    ),
    (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers: expected a whole number from 1 to 512, found 1000000000",
    ),
    (
        {"first_k_dense_replace": -1},
        "first_k_dense_replace: expected a whole number from 0 to 2147483647, found -1",
    ),
    ({"attention_bias": 1}, "attention_bias: expected true or false, found 1"),
]


@pytest.mark.parametrize(("changes", "said"), BROKEN)
def test_an_impossible_value_is_reported_with_its_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        list_tensors(config("glm-4.6") | changes, "config.json")
    assert caught.value.problems == (f"config.json: {said}",)


def test_all_impossible_values_are_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        list_tensors(
            config("glm-4.6") | {"hidden_size": None, "vocab_size": -1, "use_qk_norm": "yes"}
        )
    assert len(caught.value.problems) == 3


def test_indexer_types_are_one_a_layer_and_known() -> None:
    with pytest.raises(InputError) as caught:
        list_tensors(config("glm-5") | {"indexer_types": ["full", "half"]}, "config.json")
    assert caught.value.problems == (
        "config.json: indexer_types: expected 78 of them, found 2",
        "config.json: indexer_types: expected 'full' or 'shared', found 'half'",
    )


@pytest.mark.parametrize("found", [None, [], ["Glm4MoeForCausalML"], [7], 7, [[]]])
def test_an_unknown_class_is_refused_with_the_nearest_one(found: Any) -> None:
    with pytest.raises(
        InputError, match=r"architectures: .*(did you mean 'Glm4MoeForCausalLM'|known are)"
    ):
        list_tensors(config("glm-4.6") | {"architectures": found})


@pytest.mark.parametrize("part", [None, 7, [], "none"])
def test_a_vision_part_that_is_no_table_is_refused(part: Any) -> None:
    with pytest.raises(InputError, match="vision_config: expected the numbers of the vision part"):
        list_vision_tensors(config("glm-4.6v-flash") | {"vision_config": part})


def test_a_recipe_may_only_have_keys_that_decide_something() -> None:
    architecture = config("glm-4.6v-flash")
    text = architecture["text_config"] | {"hidden_sise": 1}
    outer, inner = find_architecture_problems(
        architecture | {"text_config": text, "rms_norm_eps": 1e-5}, "m.toml"
    )
    assert outer.startswith("m.toml: rms_norm_eps: unknown key; ")
    assert inner == "m.toml: hidden_sise: unknown key; did you mean 'hidden_size'?"


@pytest.mark.parametrize("part", [7, [], "none"])
def test_a_recipe_whose_parts_are_no_tables_is_refused(part: Any) -> None:
    for key in ("text_config", "vision_config"):
        assert [*find_architecture_problems(config("glm-4.6v-flash") | {key: part}, "m.toml")]


def test_the_kv_cache_holds_keys_and_values_or_the_latent() -> None:
    assert read_architecture(config("glm-4.6")).kv_bytes_per_token() == 92 * 8 * 128 * 2 * 2
    assert read_architecture(config("glm-4.7-flash")).kv_bytes_per_token() == 47 * (512 + 64) * 2
    assert read_architecture(config("glm-4.6v-flash")).kv_bytes_per_token() == 40 * 2 * 128 * 2 * 2
