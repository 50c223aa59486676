"""How llama.cpp's tools arrange tensors in a file: their order, their shapes, and where a file is cut into shards. Pure."""

import re
from collections.abc import Collection, Iterable, Iterator

from quant.llama.gguf import TensorSpec

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
"""The name of a tensor of a block: its number, and the rest of the name."""


def split_block(name: str) -> tuple[int | None, str]:
    """Return the block's number and the rest of a tensor's name; no number for a tensor outside the blocks.

    Example:
        >>> split_block("blk.3.ffn_down.weight")
        (3, 'ffn_down.weight')
        >>> split_block("output.weight")
        (None, 'output.weight')
    """
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def tensor_class(name: str) -> str:
    """Return a tensor's name without its block and without ``.weight``: ``ffn_down_exps``."""
    return split_block(name)[1].removesuffix(".weight")


def is_matrix(name: str) -> bool:
    """Whether a tensor is one that is quantised: a weight that is no norm."""
    return name.endswith(".weight") and "norm" not in name


EXPERTS = re.compile(r".*_exps\.weight")
"""What `-ot ".ffn_.*_exps.=CPU"` leaves in main memory."""


EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
"""llama-quantize takes data of another size for these as none at all."""


MAX_STRING = 127
"""Bytes of a string that llama-quantize writes (struct llama_model_kv_override)."""


def sort_tensors(tensors: Collection[TensorSpec]) -> list[TensorSpec]:
    """As llama-quantize writes them (weight_name_comparer in src/llama-model-loader.h): block by block, each by name."""
    return sorted(tensors, key=lambda t: (_order(split_block(t.name)[0]), t.name))


def _order(block: int | None) -> int:
    return -1 if block is None else block


def stored_shape(tensor: TensorSpec) -> tuple[int, ...]:
    """A shape as ggml writes it: without the ones at its end."""
    length = max((n for n, size in enumerate(tensor.shape, 1) if size > 1), default=1)
    return tensor.shape[:length]


def split_into_shards(sizes: Iterable[int], max_bytes: int) -> Iterator[list[int]]:
    """Padded sizes of tensors, shard by shard, as llama-gguf-split cuts."""
    run: list[int] = []
    for size in sizes:
        if run and sum(run) + size > max_bytes:
            yield run
            run = []
        run.append(size)
    yield run
