"""Checks of a file by itself. Those that need a server are tested in test_smoke.py."""

from pathlib import Path

from quant.chat.file_checks import find_zero_tensors
from quant.llama.gguf import read_header
from tests.gguf_files import Tensor, write


def test_a_tensor_of_zeros_is_named_and_one_with_a_single_bit_is_not(tmp_path: Path) -> None:
    size = 4 * 300_000
    lone = bytes(size // 3) + b"\1" + bytes(size - size // 3 - 1)
    tensors = [
        Tensor("zero.weight", (300_000,), data=bytes(size)),
        Tensor("lone.weight", (300_000,), data=lone),
        Tensor("zero.bias", (32,), data=bytes(128)),
        Tensor("small.weight", (32,), data=bytes(128)),
    ]
    header = read_header(write(tmp_path / "f.gguf", tensors))
    assert list(find_zero_tensors(header)) == [
        f"tensor zero.weight: expected weights, found {size} bytes of zero",
        "tensor small.weight: expected weights, found 128 bytes of zero",
    ]
