"""Tiny BF16 and imatrix files with random weights, which llama-quantize reads too."""

import math
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from quant.llama import ggml
from quant.llama.gguf import TensorSpec, read_header
from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES
from quant.plan.plan import is_quantizable
from quant.quantize.engine.job import EngineJob, EngineSettings, VariantRequest

MATRIX_NAME = "imatrix.gguf"
SHAPES = {
    # name:                        row first, as GGUF stores it
    "token_embd.weight": (512, 303),
    "output_norm.weight": (512,),
    "output.weight": (512, 303),
    "blk.0.attn_norm.weight": (512,),
    "blk.0.attn_q.weight": (512, 257),
    "blk.0.attn_k.weight": (512, 1),
    "blk.0.attn_v.weight": (512, 77),
    "blk.0.attn_output.weight": (256, 512),
    "blk.0.ffn_gate_inp.weight": (512, 5),
    "blk.0.ffn_gate_exps.weight": (512, 45, 5),
    "blk.0.ffn_up_exps.weight": (512, 45, 5),
    "blk.0.ffn_down_exps.weight": (256, 101, 5),
    "blk.0.exp_probs_b.bias": (5,),
    "blk.10.ffn_down.weight": (768, 129),
    "blk.2.ffn_up.weight": (1024, 61),
}
"""Odd numbers of rows, blocks 2 and 10 out of the order of their digits, a matrix of one row."""
LARGE = {
    "token_embd.weight": (512, 1500),
    "output.weight": (512, 1500),
    "output_norm.weight": (512,),
    **{f"blk.{n}.ffn_{part}.weight": (768, 700) for n in (0, 2, 10) for part in ("up", "down")},
}
"""Several tensors of a megabyte, to be split into shards."""
IN_F32 = ("_norm.weight", "ffn_gate_inp.weight", ".bias", "blk.2.ffn_up.weight")
IN_F16 = ("blk.0.attn_v.weight",)
BLIND = ("blk.10.ffn_down.weight",)
"""Tensors without imatrix data."""
UNSEEN = (1, 4)
"""Experts that no token reached."""


def write_base(path: Path, shapes: dict[str, tuple[int, ...]] | None = None, seed: int = 1) -> Path:
    """Write a model in BF16, with some tensors in F16 and F32."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("engine")
    writer.add_file_type(32)
    writer.add_quantization_version(2)
    for key, value in (
        ("context_length", 64),
        ("embedding_length", 512),
        ("block_count", 11),
        ("feed_forward_length", 768),
        ("attention.head_count", 8),
        ("expert_count", 5),
        ("expert_used_count", 2),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "", "<|x|>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3, 4])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for name, shape in (shapes or SHAPES).items():
        weights = rng.standard_t(4, shape[::-1]).astype(np.float32) * np.float32(0.02)
        if name.endswith(IN_F32):
            writer.add_tensor(name, weights)
        elif name in IN_F16:
            writer.add_tensor(name, weights.astype(np.float16))
        else:
            writer.add_tensor(name, as_bf16(weights), raw_dtype=gguf.GGMLQuantizationType.BF16)
    return _finish(writer, path)


def write_matrix(path: Path, base: Path, seed: int = 2) -> Path:
    """Write its imatrix: some experts without tokens, data of a wrong size for the embedding."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for t in read_header(base).tensors:
        if not is_quantizable(t) or t.name in BLIND:
            continue
        experts = t.shape[2] if len(t.shape) > 2 else 1
        sums = rng.gamma(1.0, 5.0, (experts, t.shape[0])).astype(np.float32)
        counts = rng.integers(1, 4000, (experts, 1)).astype(np.float32)
        if experts > 1:
            sums[UNSEEN, :], counts[UNSEEN, :] = 0, 0
        if t.name == "token_embd.weight":
            sums = sums[:, :100]
        writer.add_tensor(f"{t.name}.in_sum2", sums)
        writer.add_tensor(f"{t.name}.counts", counts)
    return _finish(writer, path)


def as_bf16(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the upper halves of the floats; rounding does not matter here."""
    return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def types(base: Path, name: str, fallback: str = "Q8_0", *, covered: bool = True) -> dict[str, str]:
    """Return one type for all tensors that can have it, and a fallback type for the others."""

    def of(t: TensorSpec) -> str:
        if not is_quantizable(t):
            return t.type.name
        needs_none = not TYPES[name].needs_imatrix
        has_data = covered and t.name not in (*BLIND, "token_embd.weight")
        return name if needs_none or has_data else fallback

    return {t.name: of(t) for t in read_header(base).tensors}


def job(
    base: Path,
    matrix: Path | None,
    variants: dict[Path, dict[str, str]],
    file_type: str = "Q8_0",
    **settings: int,
) -> EngineJob:
    """Return a job of the engine for variants with these types, by path."""
    return EngineJob(
        library=ggml.find_library(find_toolchain().bin),
        base=base,
        identity="weights",
        imatrix=matrix,
        imatrix_name=MATRIX_NAME,
        variants=tuple(VariantRequest(path, t, file_type) for path, t in variants.items()),
        settings=EngineSettings(**settings),
    )


def replace_weight(base: Path, name: str, at: int, bits: int) -> None:
    """Replace one weight of a BF16 tensor by these 16 bits."""
    header = read_header(base)
    tensor = header.by_name[name]
    assert tensor.type.name == "BF16" and at < math.prod(tensor.shape)
    with base.open("r+b") as f:
        f.seek(header.data_start + tensor.offset + 2 * at)
        f.write(bits.to_bytes(2, "little"))


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
