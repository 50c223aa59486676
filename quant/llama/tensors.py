"""Names, order and shapes of tensors as llama.cpp has them, and where a file is cut. Pure.

Whoever needs a tensor's name, its block or its class takes it from here.
"""

import re
from collections.abc import Collection, Iterable, Iterator

from quant.llama.gguf import TensorSpec

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
"""The output matrix. A model with tied embeddings has none, and multiplies by the embedding."""
EMBEDDINGS = (TOKEN_EMBEDDING, "per_layer_token_embd.weight")
"""Tables of embeddings: tensor_name_match_token_embd in llama.cpp's src/llama-quant.cpp.

llama-quantize ignores importance data of the wrong length for these, and refuses it for others."""
EXPERTS = re.compile(r".*_exps\.weight")
"""Weights of routed experts, which ``-ot ".ffn_.*_exps.=CPU"`` keeps in main memory.

``--cpu-moe`` (LLM_FFN_EXPS_REGEX in llama.cpp's common/common.h) means the same tensors."""
MAX_STRING = 127
"""Bytes of a string that llama-quantize writes: val_str of llama_model_kv_override (llama.h)."""
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def split_block(name: str) -> tuple[int | None, str]:
    """Return the block's number and the rest of a tensor's name; no number outside the blocks.

    Example:
        >>> split_block("blk.3.ffn_down.weight")
        (3, 'ffn_down.weight')
        >>> split_block("output.weight")
        (None, 'output.weight')
    """
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def tensor_class(name: str) -> str:
    """Return a tensor's name without block and ``.weight``, such as ``ffn_down_exps``."""
    return split_block(name)[1].removesuffix(".weight")


def is_matrix(name: str) -> bool:
    """Whether a tensor is a weight and no norm. Of these, most are quantized.

    The names that llama-quantize leaves alone are longer (tensor_allows_quantization):
    :func:`quant.plan.plan.is_quantizable` has them.
    """
    return name.endswith(".weight") and "norm" not in name


def sort_tensors(tensors: Collection[TensorSpec]) -> list[TensorSpec]:
    """Return tensors in the order in which llama-quantize writes them.

    Those outside the blocks come first, then block after block, each by name
    (weight_name_comparer in llama.cpp's src/llama-model-loader.h).
    """

    def key(tensor: TensorSpec) -> tuple[int, str]:
        block, _ = split_block(tensor.name)
        return (-1 if block is None else block), tensor.name

    return sorted(tensors, key=key)


def stored_shape(tensor: TensorSpec) -> tuple[int, ...]:
    """Return a shape as ggml writes it, without the ones at its end (ggml_n_dims)."""
    # ggml_n_dims returns at least 1, also for a tensor of one weight.
    length = max((n for n, size in enumerate(tensor.shape, 1) if size > 1), default=1)
    return tensor.shape[:length]


def split_into_shards(sizes: Iterable[int], max_bytes: int) -> Iterator[list[int]]:
    """Yield the sizes of the tensors of each shard, as llama-gguf-split cuts (should_split).

    A shard ends before the tensor that would make it larger than the limit, so a larger tensor
    gets a shard of its own. Heads do not count.

    Args:
        sizes: Bytes of each tensor, padded, in file order.
        max_bytes: Maximum sum of a shard.
    """
    shard: list[int] = []
    for size in sizes:
        # Without `shard and`, a first tensor above the limit would leave an empty shard before it.
        # llama-gguf-split ends with an error there.
        if shard and sum(shard) + size > max_bytes:
            yield shard
            shard = []
        shard.append(size)
    yield shard
