"""How llama.cpp's tools arrange tensors in a file: their order, their shapes, and where a file is cut into shards. Pure."""

import re
from collections.abc import Collection, Iterable, Iterator

from quant.header import TensorSpec

BLOCK = re.compile(r"blk\.(\d+)\.")
MAX_STRING = 127
"""Bytes of a string that llama-quantize writes (struct llama_model_kv_override)."""


def file_order(tensors: Collection[TensorSpec]) -> list[TensorSpec]:
    """As llama-quantize writes them (weight_name_comparer in src/llama-model-loader.h): block by block, each by name."""
    return sorted(tensors, key=lambda t: (int(m[1]) if (m := BLOCK.match(t.name)) else -1, t.name))


def stored_shape(tensor: TensorSpec) -> tuple[int, ...]:
    """A shape as ggml writes it: without the ones at its end."""
    length = max((n for n, size in enumerate(tensor.shape, 1) if size > 1), default=1)
    return tensor.shape[:length]


def runs(sizes: Iterable[int], max_bytes: int) -> Iterator[list[int]]:
    """Padded sizes of tensors, shard by shard, as llama-gguf-split cuts."""
    run: list[int] = []
    for size in sizes:
        if run and sum(run) + size > max_bytes:
            yield run
            run = []
        run.append(size)
    yield run
