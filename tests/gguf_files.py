"""The builder of tiny GGUF files, sound or broken in exactly one place.

It shares no code with the reader that it tests: bytes are laid out from the format's description
(ggml's docs/gguf.md) alone.
"""

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
#         id, weights in a block, bytes of a block
BLOCKS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q6_K": (14, 256, 210),
    "IQ1_S": (19, 256, 50),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as it is written. A field that is None is computed."""

    name: str | bytes = "a.weight"
    shape: tuple[int, ...] = (32, 2)
    type: str = "F32"
    type_id: int | None = None
    dims: int | None = None
    name_length: int | None = None
    offset: int | None = None
    data: bytes | None = None

    def bytes(self) -> bytes:
        """Return the data that was given, or noise whose seed is the name."""
        if self.data is not None:
            return self.data
        _, block, block_bytes = BLOCKS[self.type]
        elements = 1
        for n in self.shape:
            elements *= n
        return random.Random(str(self.name)).randbytes(elements // block * block_bytes)


@dataclass(frozen=True)
class Key:
    """A metadata key as it is written."""

    name: str | bytes
    kind: int
    value: bytes
    name_length: int | None = None


def text(value: str | bytes, length: int | None = None) -> bytes:
    """Return a GGUF string, with a wrong length if one is given."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, value: Any) -> Key:
    """Return a key of the type that its Python value suggests."""
    kind, raw = _encoded(value)
    return Key(name, kind, raw)


def array(kind: int, count: int, raw: bytes) -> bytes:
    """Return the value of an array, of any count and element type."""
    return struct.pack("<IQ", kind, count) + raw


def _encoded(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, text(value)
    kinds, raws = zip(*map(_encoded, value), strict=True)
    return ARRAY, array(kinds[0], len(value), b"".join(raws))


LLAMA = (
    key("general.architecture", "llama"),
    key("general.name", "tiny"),
    key("llama.block_count", 1),
    key("llama.rope.freq_base", 10000.0),
    key("tokenizer.ggml.tokens", ["a", "b", "ü"]),
    key("tokenizer.ggml.scores", [0.0, 1.5, -2.0]),
    key("tokenizer.ggml.add_bos_token", False),
)
TWO = (Tensor("a.weight", (32, 2)), Tensor("b.weight", (64, 2), "Q8_0"))


def content(
    tensors: Sequence[Tensor] = TWO,
    keys: Sequence[Key] = LLAMA,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
    cut: int = 0,
) -> bytes:
    """Return the bytes of a GGUF file, without the last ``cut`` ones."""
    head = magic + struct.pack(
        "<IQQ", version, _or(n_tensors, len(tensors)), _or(n_keys, len(keys))
    )
    for k in keys:
        head += text(k.name, k.name_length) + struct.pack("<I", k.kind) + k.value
    data = b""
    for t in tensors:
        type_id = BLOCKS[t.type][0] if t.type_id is None else t.type_id
        head += text(t.name, t.name_length) + struct.pack("<I", _or(t.dims, len(t.shape)))
        head += struct.pack(f"<{len(t.shape)}QIQ", *t.shape, type_id, _or(t.offset, len(data)))
        data += _pad(t.bytes(), alignment)
    whole = _pad(head, alignment) + data
    return whole[: len(whole) - cut]


def write(
    path: Path, tensors: Sequence[Tensor] = TWO, keys: Sequence[Key] = LLAMA, **faults: Any
) -> Path:
    """Write a GGUF file at ``path``, sound unless a fault is given, and return the path."""
    path.write_bytes(content(tensors, keys, **faults))
    return path


def _or(given: int | None, computed: int) -> int:
    return computed if given is None else given


def _pad(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)
