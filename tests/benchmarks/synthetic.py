"""Write a BF16 file and an imatrix with GLM-4.6's tensors scaled down, of any size, with random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from quant.llama.gguf import TensorSpec, read_header
from quant.plan.inventory import list_tensors
from quant.plan.plan import find_coverable, is_quantizable

NUMBERS: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "hidden_size": 1024,
    "num_nextn_predict_layers": 1,
    "intermediate_size": 2560,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 30208,
    "attention_bias": True,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "mtp_own_embedding": False,
}
"""GLM-4.6 with a fifth of its width, a third of an expert's, and fewer of them."""
BLOCK_BYTES = 211_000_000
"""Bytes of a block with experts; the rest of the model is about as large."""


def write_synthetic(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """Write a model of about that size and its imatrix, if they are missing; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    base, matrix = folder / "base.gguf", folder / "imatrix.gguf"
    blocks = max(round(gigabytes * 1e9 / BLOCK_BYTES) - 1, 1)
    if not base.exists():
        _write_base(base, list_tensors(NUMBERS | {"num_hidden_layers": blocks}), blocks)
    if not matrix.exists():
        _write_matrix(matrix, read_header(base).tensors)
    return base, matrix


def _write_base(path: Path, tensors: tuple[TensorSpec, ...], blocks: int) -> None:
    writer = gguf.GGUFWriter(
        path.with_suffix(".partial"), "llama"
    )  # of this architecture llama-quantize requires no special keys
    writer.add_name("synthetic")
    for key, value in (
        ("context_length", 4096),
        ("embedding_length", 1024),
        ("block_count", blocks + 1),
        ("feed_forward_length", 2560),
        ("attention.head_count", 16),
        ("expert_count", 64),
        ("expert_used_count", 8),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for t in tensors:
        kind = gguf.GGMLQuantizationType[t.type.name]
        item = np.dtype(np.float32 if t.type.name == "F32" else np.uint16)
        writer.add_tensor_info(t.name, list(t.shape[::-1]), item, t.bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    for t in tensors:
        writer.write_tensor_data(_weights(rng, t))
    writer.close()
    path.with_suffix(".partial").rename(path)


def _weights(rng: np.random.Generator, tensor: TensorSpec) -> NDArray[Any]:
    """Return normal weights, each row with a standard deviation of its own."""
    row = tensor.shape[0]
    weights = rng.standard_normal((tensor.elements // row, row), np.float32)
    weights *= np.float32(0.02) * rng.lognormal(0, 0.3, (len(weights), 1)).astype(np.float32)
    return (
        weights if tensor.type.name == "F32" else (weights.view(np.uint32) >> 16).astype(np.uint16)
    )


def _write_matrix(path: Path, tensors: tuple[TensorSpec, ...]) -> None:
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 100)
    writer.add_uint32("imatrix.chunk_size", 512)
    for t in _covered(tensors):
        experts = t.shape[2] if len(t.shape) > 2 else 1
        counts = rng.integers(1, 4000, (experts, 1)).astype(np.float32)
        writer.add_tensor(
            f"{t.name}.in_sum2",
            rng.gamma(1.0, 5.0, (experts, t.shape[0])).astype(np.float32) * counts,
        )
        writer.add_tensor(f"{t.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _covered(tensors: tuple[TensorSpec, ...]) -> Iterator[TensorSpec]:
    known = find_coverable(tensors)
    return (t for t in tensors if is_quantizable(t) and t.name in known)
