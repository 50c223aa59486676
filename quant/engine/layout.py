"""Where every byte of a variant's file will lie: its head, as llama-quantize writes it, and the place of each tensor.

Pure: the head of the BF16 file and a table of types in, a layout out. Every length is known before anything is written.

llama-quantize copies the keys of its input in their order; a key that it sets is taken out and stands at the end again
(gguf_set_val_*): version and file type first, then what it says of the imatrix (src/llama-quant.cpp and
tools/quantize/quantize.cpp).
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from quant.footprint import MAX_STRING, stored_shape
from quant.ggml_types import FILE_TYPES, TYPES, GGMLType
from quant.header import ALIGNMENT, ARRAY, MAGIC, SCALARS, STRING, UINT32, VERSION, Header, TensorSpec, padded
from quant.plan import file_order

QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION."""
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
HEAD = struct.Struct("<4sIQQ")


@dataclass(frozen=True)
class Placed:
    """One tensor of a file."""

    source: TensorSpec
    """As it is in the BF16 file."""
    type: GGMLType
    offset: int
    """From the start of the file."""

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
class Layout:
    """A whole file that is still to be written."""

    head: bytes
    """Everything before the data, padding included."""
    tensors: tuple[Placed, ...]

    @property
    def bytes(self) -> int:
        """Length of the file."""
        last = self.tensors[-1]
        return padded(last.offset + last.bytes)

    @cached_property
    def digest(self) -> str:
        """The sha256 of all that it says: the head holds every name, shape, type and offset."""
        sources = "".join(f"{t.source.type.name} {t.source.offset}\n" for t in self.tensors)
        return hashlib.sha256(self.head + sources.encode()).hexdigest()


def lay_out(base: Header, head: bytes, types: Mapping[str, str], file_type: str, about: Mapping[str, Any]) -> Layout:
    """The file that a table of types makes of a BF16 file, whose first bytes are ``head``.

    ``about`` is what is said of the imatrix: :func:`about_matrix`, or nothing where there is none.
    """
    added = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": FILE_TYPES[file_type], **about}
    kept = [raw for name, raw in keys(head) if name not in added and name not in SPLIT_KEYS]
    entries = [*kept, *(_entry(name, value) for name, value in added.items())]
    order = file_order(base.tensors)
    infos, offset = [], 0
    placed = []
    for tensor in order:
        made = replace(tensor, type=TYPES[types[tensor.name]], shape=stored_shape(tensor))
        infos.append(_info(made, offset))
        placed.append((tensor, made.type, offset))
        offset += padded(made.bytes)
    start = HEAD.pack(MAGIC, VERSION, len(order), len(entries)) + b"".join(entries) + b"".join(infos)
    start += bytes(-len(start) % ALIGNMENT)
    return Layout(start, tuple(Placed(tensor, kind, len(start) + at) for tensor, kind, at in placed))


def about_matrix(metadata: Mapping[str, Any], entries: int, name: str) -> dict[str, Any]:
    """What llama-quantize says of an imatrix that was called by that name, in its order."""
    about: dict[str, Any] = {"quantize.imatrix.file": name}
    if datasets := metadata.get("imatrix.datasets"):
        about["quantize.imatrix.dataset"] = datasets[0]
    about["quantize.imatrix.entries_count"] = entries
    if (chunks := metadata.get("imatrix.chunk_count", 0)) > 0:
        about["quantize.imatrix.chunks_count"] = chunks
    return about


def keys(head: bytes) -> Iterator[tuple[str, bytes]]:
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
    return _text(name.encode()) + struct.pack("<I", STRING) + _text(_as_c(value.encode())[:MAX_STRING])


def _info(tensor: TensorSpec, offset: int) -> bytes:
    shape = tensor.shape
    return _text(tensor.name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type.id, offset)
