"""Where every byte of a variant's files will lie: their heads, as llama-quantize writes them, and each tensor's place.

Pure: the head of the BF16 file and a table of types in, a layout out. Every length is known before anything is written.

llama-quantize copies the keys of its input in their order; a key that it sets is taken out and stands at the end again
(gguf_set_val_*): version and file type first, then what it says of the imatrix (src/llama-quant.cpp and
tools/quantize/quantize.cpp). Shards are those of llama-gguf-split (tools/gguf-split): the first repeats all keys.
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
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
HEAD = struct.Struct("<4sIQQ")


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of a file."""

    source: TensorSpec
    """As it is in the BF16 file."""
    type: GGMLType
    part: int
    """Which of the files holds it."""
    offset: int
    """From the start of that file."""

    @property
    def name(self) -> str:
        """What it is called in both files."""
        return self.source.name

    @property
    def bytes(self) -> int:
        """Size of its data, without padding."""
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
    """The files of one variant, which are still to be written: a whole one, or shards."""

    heads: tuple[bytes, ...]
    """Of each file, everything before the data, padding included."""
    tensors: tuple[PlacedTensor, ...]
    split: bool

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
        """The sha256 of all that it says: the heads hold every name, shape, type and offset."""
        sources = "".join(f"{t.source.type.name} {t.source.offset}\n" for t in self.tensors)
        return hashlib.sha256(b"".join(self.heads) + sources.encode()).hexdigest()

    def names(self, stem: str) -> tuple[str, ...]:
        """What the files are called, by llama.cpp's rule for shards."""
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
    about: Mapping[str, Any],
    max_bytes: int | None = None,
) -> FileLayout:
    """The file that a table of types makes of a BF16 file, whose first bytes are ``head``.

    ``about`` is what is said of the imatrix: :func:`about_matrix`, or nothing where there is none. With ``max_bytes``
    it is cut into shards with at most so many bytes of tensors, which each tensor has to fit into.
    """
    added = {
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": FILE_TYPES[file_type],
        **about,
    }
    kept = [
        raw for name, raw in metadata_keys(head) if name not in added and name not in SPLIT_KEYS
    ]
    entries = [*kept, *(_entry(name, value) for name, value in added.items())]
    order = [
        replace(t, type=TYPES[types[t.name]], shape=stored_shape(t))
        for t in sort_tensors(base.tensors)
    ]
    shards = (
        [len(run) for run in split_into_shards((pad(t.bytes) for t in order), max_bytes)]
        if max_bytes
        else [len(order)]
    )
    heads, placed, first = [], [], 0
    for part, count in enumerate(shards):
        about_split = _split_entries(part, len(shards), len(order)) if max_bytes else []
        start, offsets = _head(
            [*(entries if part == 0 else []), *about_split], order[first : first + count]
        )
        heads.append(start)
        for made, offset in zip(order[first : first + count], offsets, strict=True):
            placed.append(PlacedTensor(base.by_name[made.name], made.type, part, offset))
        first += count
    return FileLayout(tuple(heads), tuple(placed), max_bytes is not None)


def _head(entries: Sequence[bytes], tensors: Sequence[TensorSpec]) -> tuple[bytes, list[int]]:
    """Everything before the data of a file that holds these keys and tensors, and where each of them begins."""
    offsets = [0, *accumulate(pad(t.bytes) for t in tensors)]
    infos = b"".join(_info(t, offset) for t, offset in zip(tensors, offsets, strict=False))
    head = HEAD.pack(MAGIC, VERSION, len(tensors), len(entries)) + b"".join(entries) + infos
    head += bytes(-len(head) % ALIGNMENT)
    return head, [len(head) + offset for offset in offsets[:-1]]


def _split_entries(part: int, parts: int, tensors: int) -> list[bytes]:
    """What llama-gguf-split says in every shard, in its order: it writes the count last."""
    said = (
        ("split.no", UINT16, "H", part),
        ("split.tensors.count", INT32, "i", tensors),
        ("split.count", UINT16, "H", parts),
    )
    return [
        _text(name.encode()) + struct.pack(f"<I{code}", kind, value)
        for name, kind, code, value in said
    ]


def imatrix_keys(metadata: Mapping[str, Any], entries: int, name: str) -> dict[str, Any]:
    """What llama-quantize says of an imatrix that was called by that name, in its order."""
    about: dict[str, Any] = {"quantize.imatrix.file": name}
    if datasets := metadata.get("imatrix.datasets"):
        about["quantize.imatrix.dataset"] = datasets[0]
    about["quantize.imatrix.entries_count"] = entries
    if (chunks := metadata.get("imatrix.chunk_count", 0)) > 0:
        about["quantize.imatrix.chunks_count"] = chunks
    return about


def metadata_keys(head: bytes) -> Iterator[tuple[str, bytes]]:
    """Every key of a head that was checked before, with its name and its value as llama-quantize repeats them."""
    _, _, _, count = HEAD.unpack_from(head)
    at = HEAD.size
    for _ in range(count):
        name, at = _string(head, at)
        (kind,) = struct.unpack_from("<I", head, at)
        value, at = _value(head, at + 4, kind)
        yield name.decode(), _text(name) + struct.pack("<I", kind) + value


def _value(head: bytes, at: int, kind: int) -> tuple[bytes, int]:
    if kind == STRING:
        text, end = _string(head, at)
        return _text(_as_c(text)), end
    if kind != ARRAY:
        end = at + struct.calcsize(SCALARS[kind])
        return head[at:end], end
    inner, count = struct.unpack_from("<IQ", head, at)
    start = at + struct.calcsize("<IQ")
    if inner != STRING:
        end = start + count * struct.calcsize(SCALARS[inner])
        return head[at:end], end
    parts, end = [head[at:start]], start
    for _ in range(count):
        text, end = _string(head, end)
        parts.append(_text(_as_c(text)))
    return b"".join(parts), end


def _as_c(text: bytes) -> bytes:
    """A string as it comes through a C function: up to its first zero."""
    return text.split(b"\0", 1)[0]


def _string(head: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", head, at)
    return head[at + 8 : at + 8 + length], at + 8 + length


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _entry(name: str, value: int | str) -> bytes:
    if isinstance(value, int):
        return _text(name.encode()) + struct.pack("<II", UINT32, value)
    return (
        _text(name.encode()) + struct.pack("<I", STRING) + _text(_as_c(value.encode())[:MAX_STRING])
    )


def _info(tensor: TensorSpec, offset: int) -> bytes:
    shape = tensor.shape
    return _text(tensor.name.encode()) + struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type.id, offset
    )
