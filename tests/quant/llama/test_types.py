"""The type table, held against gguf-py's."""

import gguf
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from quant.core.errors import InputError
from quant.llama.types import BY_ID, FILE_TYPES, TYPES, find_type

LEFT_OUT = {"Q8_1", "Q8_K", "NVFP4", "Q1_0"}
"""Formats of intermediate results, and two that no released recipe uses."""


@pytest.mark.parametrize("name", TYPES)
def test_id_block_and_size_are_ggmls(name: str) -> None:
    theirs = GGMLQuantizationType[name]
    assert (TYPES[name].id, TYPES[name].block, TYPES[name].block_bytes) == (
        int(theirs),
        *GGML_QUANT_SIZES[theirs],
    )


def test_every_type_of_ggml_is_known_or_left_out_on_purpose() -> None:
    assert {t.name for t in GGMLQuantizationType} - LEFT_OUT == set(TYPES)


def test_every_type_has_its_id_in_the_index() -> None:
    assert {t.id: t.name for t in BY_ID.values()} == {t.id: t.name for t in TYPES.values()}
    assert all(BY_ID[t.id] is t for t in TYPES.values())


@pytest.mark.parametrize("name", FILE_TYPES)
def test_file_types_are_llama_cpps(name: str) -> None:
    theirs = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
    assert FILE_TYPES[name] == int(LlamaFileType[theirs])


def test_sizes_agree_with_gguf_py_on_whole_tensors() -> None:
    for t in TYPES.values():
        shape = (7, 3 * t.block)
        assert (
            t.bytes(7 * 3 * t.block)
            == 7 * gguf.quant_shape_to_byte_shape(shape, GGMLQuantizationType(t.id))[1]
        )


def test_bits_per_weight_count_the_scales() -> None:
    assert TYPES["Q4_0"].bits_per_weight == 4.5
    assert TYPES["Q6_K"].bits_per_weight == 6.5625
    assert TYPES["IQ1_S"].bits_per_weight == 1.5625
    assert TYPES["BF16"].bits_per_weight == 16


def test_weights_that_do_not_fill_a_block_have_no_size() -> None:
    with pytest.raises(ValueError, match=r"100 weights do not fill blocks of 32 \(Q8_0\)"):
        TYPES["Q8_0"].bytes(100)


def test_a_row_fits_when_it_is_whole_blocks() -> None:
    assert TYPES["Q4_K"].fits(512)
    assert not TYPES["Q4_K"].fits(384)
    assert TYPES["Q8_0"].fits(384)


def test_an_unknown_type_is_an_error_with_the_nearest_name() -> None:
    assert find_type("IQ2_XXS") is TYPES["IQ2_XXS"]
    with pytest.raises(
        InputError, match=r"type 'q4_k_m' is not one of ggml's: did you mean 'Q4_K'\?"
    ):
        find_type("q4_k_m")


def test_types_below_three_bits_need_an_imatrix_as_llama_quantize_says() -> None:
    # tensor_requires_imatrix in llama-quant.cpp
    requiring = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
    assert {t.name for t in TYPES.values() if t.needs_imatrix} == requiring
