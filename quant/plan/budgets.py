"""Size targets: how large an allocated file may be, and how a person writes that. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quant.core.errors import InputError
from quant.llama.gguf import TensorSpec

SCALES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
"""Bytes by unit."""
FILE_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(SCALES)})")
# The same number has two group names: Python allows each name once in an expression.
MEMORY_BUDGET = re.compile(
    r"(?P<gpu>[^,+]*) gpu(?: \+ (?P<ram>[^,]*) ram)?(?:, ctx (?P<context>\d+))?"
    r"|(?P<only>[^,+]*) ram(?:, ctx (?P<tokens>\d+))?"
)


@dataclass(frozen=True)
class SizeTarget:
    """How large a file may be."""

    bytes: int
    """Bytes of the whole file."""
    rest_bytes: int | None = None
    """Bytes of everything but routed experts, where that must fit an accelerator."""


def parse_file_size(text: str) -> int:
    """Return a size such as ``84GB``, ``4843584B`` or ``80.5GiB`` in bytes.

    Raises:
        InputError: The text is no number with a known unit.
    """
    match = FILE_SIZE.fullmatch(text.strip())
    if not match:
        raise InputError(
            f"size: expected a number with one of {', '.join(SCALES)} behind it, found {text!r}"
        )
    # Rounded down: a file may not exceed its target by a byte.
    return int(float(match[1]) * SCALES[match[2]])


def parse_memory_budget(text: str, kv_bytes: int) -> SizeTarget:
    """Return the file that runs in a memory budget such as ``24GB gpu + 128GB ram, ctx 16384``.

    With both, everything but the routed experts, and the KV cache, must fit the GPU. Compute
    buffers are not counted: name the memory that is left for the model.

    Args:
        text: The memory budget.
        kv_bytes: Bytes of KV cache for one token of context.

    Raises:
        InputError: The text is no memory budget.
    """
    match = MEMORY_BUDGET.fullmatch(text.strip())
    if not match:
        raise InputError(
            f"fits: expected a text like '24GB gpu + 128GB ram, ctx 16384', found {text!r}"
        )
    if match["only"]:
        return SizeTarget(parse_file_size(match["only"]) - kv_bytes * int(match["tokens"] or 0))
    # With -ot exps=CPU llama.cpp still keeps the whole KV cache on the GPU.
    gpu = parse_file_size(match["gpu"]) - kv_bytes * int(match["context"] or 0)
    if not match["ram"]:
        return SizeTarget(gpu)
    return SizeTarget(gpu + parse_file_size(match["ram"]), rest_bytes=gpu)


def make_bpw_target(tensors: Sequence[TensorSpec], head_bytes: int, bpw: float) -> SizeTarget:
    """Return the file of ``bpw`` bits per weight, averaged over all weights, and its head."""
    return SizeTarget(int(bpw * sum(t.elements for t in tensors) / 8) + head_bytes)
