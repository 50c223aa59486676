"""Read what a GGUF file says of itself: metadata, tensors, and where each tensor's bytes lie.

The format is ggml's ``docs/gguf.md``, version 3, little-endian. Every count is checked against the file's length before
anything of that size is read, because files come from strangers; what is wrong is raised as an InputError that names
the file and the field. Weights are never read here.
"""

import hashlib
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from quant.errors import InputError
from quant.llama.types import BY_ID, GGMLType

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 63
"""A tensor's name, as ggml keeps it (GGML_MAX_NAME with the final zero)."""
HEAD_BYTES = 2**27
"""No head is longer: the largest vocabularies take 20 MB, and a count in a huge file could ask for all memory."""
CHUNK_BYTES = 16 * 2**20
"""One read while hashing a tensor."""

#         id   struct
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
UINT16, UINT32, INT32, STRING, ARRAY = 2, 4, 5, 8, 9
FIRST_SHARD = re.compile(r"(.*-)00001-of-([0-9]{5})")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model: what it is called, how it is stored, and where."""

    name: str
    shape: tuple[int, ...]
    """Row length first, as GGUF stores it."""
    type: GGMLType
    offset: int = 0
    """From the start of the data section."""

    @property
    def elements(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of its data, without padding."""
        return self.type.bytes(self.elements)


@dataclass(frozen=True)
class Header:
    """The head of one GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorSpec, ...]
    data_start: int
    """Where the data section begins in the file."""
    head_bytes: int = field(default=0, compare=False)
    """Length of all that stands before it, without the padding in between."""

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """The tensors by their names."""
        return {t.name: t for t in self.tensors}

    @property
    def architecture(self) -> str:
        """``general.architecture``, or nothing for the later shards of a split."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def elements(self) -> int:
        """Weights in all tensors."""
        return sum(t.elements for t in self.tensors)

    def tensor_digests(self) -> dict[str, str]:
        """sha256 of every tensor's bytes, in the order in which they lie in the file."""
        with self.path.open("rb") as f:
            return {t.name: _digest(f, self.data_start + t.offset, t.bytes) for t in self.tensors}


def pad(size: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return -(-size // alignment) * alignment


def read_header(path: Path) -> Header:
    """The head of a GGUF file, checked: every tensor lies inside the file, no name twice, no byte claimed by two.

    Raises InputError that names the file and what was expected and found.
    """
    try:
        with path.open("rb") as f:
            return _Reader(f, path).header()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def list_shards(first: Path) -> tuple[Path, ...]:
    """All files of a model: the shards of a split when its first shard is named, else the one file."""
    match = FIRST_SHARD.fullmatch(first.stem)
    if not match or not int(match[2]):
        return (first,)
    return tuple(
        first.with_name(f"{match[1]}{n:05d}-of-{match[2]}.gguf")
        for n in range(1, int(match[2]) + 1)
    )


def read_headers(first: Path) -> tuple[Header, ...]:
    """The heads of all files of a model; raises InputError for each shard that is missing or does not belong."""
    paths = list_shards(first)
    if len(paths) > 1 and (missing := [p for p in paths if not p.is_file()]):
        raise InputError(
            *(f"{p}: missing; expected {len(paths)} shards beside {first.name}" for p in missing)
        )
    headers = tuple(read_header(p) for p in paths)
    if len(headers) > 1:
        for no, header in enumerate(headers):
            found = header.metadata.get("split.no"), header.metadata.get("split.count")
            if found != (no, len(headers)):
                raise InputError(
                    f"{header.path}: split.no, split.count: expected {(no, len(headers))}, found {found}"
                )
    return headers


def _digest(f: BinaryIO, start: int, size: int) -> str:
    f.seek(start)
    sha = hashlib.sha256()
    while size:
        chunk = f.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise InputError(f"{f.name}: ends early, {size} bytes of a tensor are missing")
        sha.update(chunk)
        size -= len(chunk)
    return sha.hexdigest()


class _Reader:
    """Walks forward through the head of one file."""

    def __init__(self, f: BinaryIO, path: Path) -> None:
        self.f, self.path, self.size = f, path, os.fstat(f.fileno()).st_size
        self.head_end = min(self.size, HEAD_BYTES)

    def header(self) -> Header:
        if (magic := self.take(4, "magic")) != MAGIC:
            self.fail("magic", repr(MAGIC), repr(magic))
        if (version := self.number("I", "version")) != VERSION:
            self.fail("version", VERSION, version)
        n_tensors, n_keys = self.count(24, "tensor count"), self.count(12, "key count")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            if not (key := self.string("a key")):
                self.fail("a key", "a name", "nothing")
            if key in metadata:
                self.fail(f"key {key!r}", "once", "twice")
            if (kind := self.number("I", key)) != UINT32 and key == "general.alignment":
                self.fail(key, "a 32-bit number", f"type {kind}")
            metadata[key] = self.value(kind, key)
        tensors = tuple(self.tensor() for _ in range(n_tensors))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if alignment < 8 or alignment & (alignment - 1):
            self.fail("general.alignment", "a power of two from 8", alignment)
        head_bytes = self.f.tell()
        start = pad(head_bytes, alignment)
        self.check_layout(tensors, start, alignment)
        return Header(self.path, metadata, tensors, start, head_bytes)

    def check_layout(self, tensors: tuple[TensorSpec, ...], start: int, alignment: int) -> None:
        names: set[str] = set()
        expected = 0
        for t in tensors:
            if t.name in names:
                self.fail(f"tensor {t.name}", "once", "twice")
            names.add(t.name)
            if t.offset != expected:
                self.fail(f"offset of tensor {t.name}", expected, t.offset)
            if start + t.offset + t.bytes > self.size:
                self.fail(
                    f"tensor {t.name}",
                    f"data up to byte {start + t.offset + t.bytes}",
                    f"{self.size} bytes",
                )
            expected += pad(t.bytes, alignment)

    def tensor(self) -> TensorSpec:
        name = self.string("a tensor name")
        if len(name.encode()) > MAX_NAME_BYTES:
            self.fail(f"tensor name {name}", f"at most {MAX_NAME_BYTES} bytes", len(name.encode()))
        if not 1 <= (dims := self.number("I", f"dimensions of {name}")) <= MAX_DIMS:
            self.fail(f"dimensions of {name}", f"1 to {MAX_DIMS}", dims)
        shape = tuple(self.number("Q", f"shape of {name}") for _ in range(dims))
        if (type_id := self.number("I", f"type of {name}")) not in BY_ID:
            self.fail(f"type of {name}", "a ggml type", type_id)
        ggml_type = BY_ID[type_id]
        # Python's ints on purpose: a fixed-width product wraps silently on a crafted shape.
        if math.prod(shape) < 1 or math.prod(shape) > 8 * self.size * ggml_type.block:
            self.fail(f"shape of {name}", "a tensor that fits the file", shape)
        if not ggml_type.fits(shape[0]):
            self.fail(
                f"row of {name}", f"a multiple of {ggml_type.block} for {ggml_type.name}", shape[0]
            )
        return TensorSpec(name, shape, ggml_type, self.number("Q", f"offset of {name}"))

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            self.fail(f"type of {key}", "a GGUF value type", kind)
        return list(self.array(key))

    def array(self, key: str) -> Iterator[Any]:
        kind = self.number("I", key)
        if kind in SCALARS:
            n = self.count(struct.calcsize(SCALARS[kind]), key)
            yield from struct.unpack(
                f"<{n}{SCALARS[kind]}", self.take(n * struct.calcsize(SCALARS[kind]), key)
            )
        elif kind == STRING:
            for _ in range(self.count(8, key)):
                yield self.string(key)
        else:
            self.fail(f"element type of {key}", "a scalar or a string", kind)

    def count(self, least_bytes: int, what: str) -> int:
        """A count of things of at least so many bytes each, which the rest of the head must be able to hold."""
        n: int = self.number("Q", what)
        room = max(self.head_end - self.f.tell(), 0)
        if n * least_bytes > room:
            self.fail(what, f"at most {room // least_bytes}", n)
        return n

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.count(1, f"length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(what, "UTF-8", raw[:20])

    def take(self, size: int, what: str) -> bytes:
        data = self.f.read(size)
        if len(data) != size:
            self.fail(what, f"{size} bytes", f"the end of the file after {len(data)}")
        return data

    def fail(self, what: str, expected: Any, found: Any) -> NoReturn:
        raise InputError(f"{self.path}: {what}: expected {expected}, found {found}")
