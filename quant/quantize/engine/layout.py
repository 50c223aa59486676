"""Where every byte of a variant's files lies: their headers, as llama-quantize writes them. Pure.

The header of the base and a table of types go in, a layout comes out. Every length is known before
anything is written.

llama-quantize copies the keys of its input in their order. A key that it sets itself is removed and
appended (gguf_set_val_* in ggml/src/gguf.cpp): version and file type first, then what it knows of
the imatrix (src/llama-quant.cpp, tools/quantize/quantize.cpp). Shards are those of llama-gguf-split
(tools/gguf-split): the first repeats all keys.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from quant.llama.gguf import (
    ALIGNMENT,
    ARRAY,
    INT32,
    MAGIC,
    SCALARS,
    STRING,
    UINT16,
    UINT32,
    VERSION,
    Header,
    TensorSpec,
    pad,
)
from quant.llama.tensors import MAX_STRING, sort_tensors, split_into_shards, stored_shape
from quant.llama.types import FILE_TYPES, TYPES, GGMLType

QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION."""
# llama-quantize removes these keys of its input (gguf_remove_key in src/llama-quant.cpp).
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
HEAD = struct.Struct("<4sIQQ")


@dataclass(frozen=True)
class TensorPlacement:
    """One tensor of a variant, and where its data lies."""

    source: TensorSpec
    """The tensor of the base."""
    type: GGMLType
    part: int
    """Index of the file that holds it."""
    offset: int
    """Bytes from the start of that file."""

    @property
    def name(self) -> str:
        """Its name, the same in the base and the variant."""
        return self.source.name

    @property
    def bytes(self) -> int:
        """Size of its data without padding."""
        return self.type.bytes(self.source.elements)

    @property
    def row(self) -> int:
        """Weights in a row."""
        return self.source.shape[0]

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self.type.bytes(self.row)


@dataclass(frozen=True)
class FileLayout:
    """The planned files of one variant: one file, or shards."""

    heads: tuple[bytes, ...]
    """Everything before the data of each file, padding included."""
    tensors: tuple[TensorPlacement, ...]
    split: bool
    """Whether the files are named as shards, even if there is only one."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Length of each file."""
        ends = [len(head) for head in self.heads]
        for t in self.tensors:
            ends[t.part] = pad(t.offset + t.bytes)
        return tuple(ends)

    @property
    def bytes(self) -> int:
        """Length of all files."""
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        """The sha256 of the layout: the heads hold every name, shape, type and offset."""
        # The sources too: where and how the base stores a tensor is in no head.
        sources = "".join(f"{t.source.type.name} {t.source.offset}\n" for t in self.tensors)
        return hashlib.sha256(b"".join(self.heads) + sources.encode()).hexdigest()

    def file_names(self, stem: str) -> tuple[str, ...]:
        """Return the names of the files, by llama.cpp's rule for shards (llama_split_path)."""
        count = len(self.heads)
        return (
            tuple(f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1))
            if self.split
            else (f"{stem}.gguf",)
        )


def make_layout(
    base: Header,
    head: bytes,
    types: Mapping[str, str],
    file_type: str,
    imatrix_metadata: Mapping[str, Any],
    max_bytes: int | None = None,
) -> FileLayout:
    """Return the files that a table of types makes of a base.

    Args:
        base: The header of the base.
        head: The first bytes of the base, from which keys are copied as they are.
        types: The type of every tensor, by its name.
        file_type: The name of llama.cpp's file type, such as Q4_K_M.
        imatrix_metadata: What :func:`make_imatrix_metadata` returns; empty without an imatrix.
        max_bytes: The most bytes of tensors in a shard, in which each tensor must fit. None leaves
            the file whole.
    """
    added = {
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": FILE_TYPES[file_type],
        **imatrix_metadata,
    }
    copied = [
        raw for name, raw in iterate_metadata(head) if name not in added and name not in SPLIT_KEYS
    ]
    entries = [*copied, *(_pack_entry(name, value) for name, value in added.items())]
    tensors = [
        replace(t, type=TYPES[types[t.name]], shape=stored_shape(t))
        for t in sort_tensors(base.tensors)
    ]
    # The order of tensors is llama-quantize's, which sorts by block number and name.
    if max_bytes:
        runs = split_into_shards((pad(t.bytes) for t in tensors), max_bytes)
        shards = [len(run) for run in runs]
    else:
        shards = [len(tensors)]
    heads: list[bytes] = []
    placements: list[TensorPlacement] = []
    first = 0
    for part, count in enumerate(shards):
        split = _pack_split_entries(part, len(shards), len(tensors)) if max_bytes else []
        in_part = tensors[first : first + count]
        part_head, offsets = _pack_head([*(entries if part == 0 else []), *split], in_part)
        heads.append(part_head)
        for t, offset in zip(in_part, offsets, strict=True):
            placements.append(TensorPlacement(base.by_name[t.name], t.type, part, offset))
        first += count
    return FileLayout(tuple(heads), tuple(placements), max_bytes is not None)


def make_imatrix_metadata(metadata: Mapping[str, Any], entries: int, name: str) -> dict[str, Any]:
    """Return the keys that llama-quantize writes about an imatrix, in its order.

    Args:
        metadata: The metadata of the imatrix.
        entries: Tensors that it has data for.
        name: The file name to publish, instead of a path of this machine.
    """
    keys: dict[str, Any] = {"quantize.imatrix.file": name}
    if datasets := metadata.get("imatrix.datasets"):
        keys["quantize.imatrix.dataset"] = datasets[0]
    keys["quantize.imatrix.entries_count"] = entries
    if (chunks := metadata.get("imatrix.chunk_count", 0)) > 0:
        keys["quantize.imatrix.chunks_count"] = chunks
    return keys


def iterate_metadata(head: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name of every key, and the key as llama-quantize repeats it.

    The head must have been checked before (:func:`quant.llama.gguf.read_header`).
    """
    _, _, _, count = HEAD.unpack_from(head)
    offset = HEAD.size
    for _ in range(count):
        name, offset = _read_string(head, offset)
        (kind,) = struct.unpack_from("<I", head, offset)
        value, offset = _read_value(head, offset + 4, kind)
        yield name.decode(), _pack_string(name) + struct.pack("<I", kind) + value


def _pack_head(entries: Sequence[bytes], tensors: Sequence[TensorSpec]) -> tuple[bytes, list[int]]:
    """Return everything before the data of a file, and the offset of each of its tensors."""
    # Every tensor starts at a multiple of 32 bytes from the start of the data.
    offsets = [0, *accumulate(pad(t.bytes) for t in tensors)]
    infos = b"".join(_pack_info(t, offset) for t, offset in zip(tensors, offsets, strict=False))
    head = HEAD.pack(MAGIC, VERSION, len(tensors), len(entries)) + b"".join(entries) + infos
    head += bytes(-len(head) % ALIGNMENT)
    return head, [len(head) + offset for offset in offsets[:-1]]


def _pack_split_entries(part: int, parts: int, tensors: int) -> list[bytes]:
    """Return the keys of a shard in llama-gguf-split's order, which writes the count last."""
    keys = (
        ("split.no", UINT16, "H", part),
        ("split.tensors.count", INT32, "i", tensors),
        ("split.count", UINT16, "H", parts),
    )
    return [
        _pack_string(name.encode()) + struct.pack(f"<I{code}", kind, value)
        for name, kind, code, value in keys
    ]


def _read_value(head: bytes, offset: int, kind: int) -> tuple[bytes, int]:
    """Return a value as llama-quantize repeats it, and the offset of what follows."""
    if kind == STRING:
        text, end = _read_string(head, offset)
        return _pack_string(_cut_at_zero(text)), end
    if kind != ARRAY:
        end = offset + struct.calcsize(SCALARS[kind])
        return head[offset:end], end
    item_kind, count = struct.unpack_from("<IQ", head, offset)
    start = offset + struct.calcsize("<IQ")
    if item_kind != STRING:
        end = start + count * struct.calcsize(SCALARS[item_kind])
        return head[offset:end], end
    parts, end = [head[offset:start]], start
    for _ in range(count):
        text, end = _read_string(head, end)
        parts.append(_pack_string(_cut_at_zero(text)))
    return b"".join(parts), end


def _cut_at_zero(text: bytes) -> bytes:
    """Return a string as llama-quantize passes it on, as a C string: up to its first zero."""
    return text.split(b"\0", 1)[0]


def _read_string(head: bytes, offset: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", head, offset)
    return head[offset + 8 : offset + 8 + length], offset + 8 + length


def _pack_string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _pack_entry(name: str, value: int | str) -> bytes:
    if isinstance(value, int):
        # Overrides that are integers are written with gguf_set_val_u32.
        return _pack_string(name.encode()) + struct.pack("<II", UINT32, value)
    # llama_model_kv_override holds texts in 128 bytes, the last of which is zero.
    text = _cut_at_zero(value.encode())[:MAX_STRING]
    return _pack_string(name.encode()) + struct.pack("<I", STRING) + _pack_string(text)


def _pack_info(tensor: TensorSpec, offset: int) -> bytes:
    shape = tensor.shape
    return _pack_string(tensor.name.encode()) + struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type.id, offset
    )
