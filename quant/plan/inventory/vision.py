"""The vision part of GLM-4.6V-Flash: a file of its own (mmproj), projector ``glm4v``.

Source: llama.cpp, conversion/qwen3vl.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES
from quant.plan.inventory.config import ArchitectureConfig, f32, matrix


@dataclass(frozen=True)
class Glm4v(ArchitectureConfig):
    """A vision transformer and a merger that turns patches into tokens.

    Matrices are in F16, as mmproj files are published.
    """

    hidden_size: int
    depth: int
    out_hidden_size: int
    """Width of the transformer's feed-forward part, and of the tokens that leave the merger."""
    intermediate_size: int
    """Width of the merger."""
    image_size: int = 336
    patch_size: int = 14
    spatial_merge_size: int = 2

    def iter_tensors(self) -> Iterator[TensorSpec]:
        """Yield every tensor; matrices in F16."""
        for t in self._iter_bf16():
            yield t if t.type.name == "F32" else replace(t, type=TYPES["F16"])

    def _iter_bf16(self) -> Iterator[TensorSpec]:
        h, out, p = self.hidden_size, self.out_hidden_size, self.patch_size
        merge = self.spatial_merge_size
        for b in (f"v.blk.{n}" for n in range(self.depth)):
            yield f32(f"{b}.ln1.weight", h)
            yield f32(f"{b}.ln2.weight", h)
            yield matrix(f"{b}.attn_qkv.weight", h, 3 * h)
            yield matrix(f"{b}.attn_out.weight", h, h)
            yield matrix(f"{b}.ffn_gate.weight", h, out)
            yield matrix(f"{b}.ffn_up.weight", h, out)
            yield matrix(f"{b}.ffn_down.weight", out, h)
        # A Conv3d over two frames, which the converter splits into two Conv2d.
        yield matrix("v.patch_embd.weight", p, p, 3, h)
        yield matrix("v.patch_embd.weight.1", p, p, 3, h)
        yield f32("v.patch_embd.bias", h)
        yield f32("v.position_embd.weight", h, (self.image_size // p) ** 2)
        yield f32("v.norm_embd.weight", h)
        yield f32("v.post_ln.weight", h)
        yield matrix("mm.patch_merger.weight", merge, merge, h, out)
        yield f32("mm.patch_merger.bias", out)
        yield matrix("mm.model.fc.weight", out, out)
        yield f32("mm.post_norm.weight", out)
        yield f32("mm.post_norm.bias", out)
        yield matrix("mm.gate.weight", out, self.intermediate_size)
        yield matrix("mm.up.weight", out, self.intermediate_size)
        yield matrix("mm.down.weight", self.intermediate_size, out)
