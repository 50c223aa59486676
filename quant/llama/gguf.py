"""Read the head of a GGUF file: metadata, tensors, and where each tensor's bytes lie.

The format is ggml's ``docs/gguf.md``, version 3, little-endian. Weights are never read here,
except to hash them.

The reader is written by hand, although gguf-py has one (gguf.GGUFReader), for two reasons. It is
13 to 21 times faster: a head of GLM-4.6's size, with 151,552 tokens, 318,088 merges and 1,700
tensors, takes 2 to 3 s instead of 42 s; gguf-py makes several numpy arrays of each string. And it
is bounded: files come from strangers, so every count is compared with the file's length before
anything of that size is read. Whatever is wrong is an InputError that names the file and the field.
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

from quant.core.errors import InputError
from quant.llama.types import BY_ID, GGMLType

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 63
"""Maximum length of a tensor's name in ggml (GGML_MAX_NAME with the final zero)."""
HEAD_BYTES = 2**27
"""Maximum length of a head. The largest vocabularies take 20 MB; without a limit, a count in a
file of hundreds of gigabytes could ask for all memory."""
CHUNK_BYTES = 16 * 2**20
"""Bytes per read while hashing a tensor."""
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""The struct code of each scalar value type (enum gguf_type in gguf.h)."""
UINT16, UINT32, INT32, STRING, ARRAY = 2, 4, 5, 8, 9
FIRST_SHARD = re.compile(r"(.*-)00001-of-([0-9]{5})")
"""The stem of a first shard (llama_split_path in llama.cpp's src/llama.cpp)."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model: its name, how it is stored, and where."""

    name: str
    shape: tuple[int, ...]
    """Row length first, as GGUF stores it."""
    type: GGMLType
    offset: int = 0
    """From the start of the data section."""

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data, without padding."""
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
    """Length of what precedes the data section, without the padding in between."""

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """The tensors by their names."""
        return {t.name: t for t in self.tensors}

    @property
    def architecture(self) -> str:
        """``general.architecture``; empty for the later shards of a split."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def elements(self) -> int:
        """Number of weights in all tensors."""
        return sum(t.elements for t in self.tensors)

    def hash_tensors(self) -> dict[str, str]:
        """Return the sha256 of every tensor's bytes, in file order. Reads the whole file.

        Raises:
            InputError: The file is shorter than its head says.
        """
        with self.path.open("rb") as f:
            return {
                t.name: _hash_range(f, self.data_start + t.offset, t.bytes) for t in self.tensors
            }


def pad(size: int, alignment: int = ALIGNMENT) -> int:
    """Round a size up to a multiple of the alignment."""
    return -(-size // alignment) * alignment


def read_header(path: Path) -> Header:
    """Read and check the head of one GGUF file.

    Every tensor must lie inside the file, no name may come twice, and no byte may belong to two
    tensors.

    Raises:
        InputError: The file cannot be read or is not sound. The error names the file, the field,
            and what was expected and found.
    """
    try:
        with path.open("rb") as f:
            return _HeaderReader(f, path).read_header()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def list_shards(first: Path) -> tuple[Path, ...]:
    """Return all shards of a model if ``first`` is named like a first one, else only itself."""
    match = FIRST_SHARD.fullmatch(first.stem)
    # -of-00000 is part of a plain name: no split has 0 shards.
    if not match or not int(match[2]):
        return (first,)
    return tuple(
        first.with_name(f"{match[1]}{n:05d}-of-{match[2]}.gguf")
        for n in range(1, int(match[2]) + 1)
    )


def read_headers(first: Path) -> tuple[Header, ...]:
    """Read the heads of all files of a model.

    Whoever needs them more than once has a :class:`~quant.llama.model_file.ModelFile`.

    Args:
        first: The file, or the first shard.

    Raises:
        InputError: A shard is missing (the error names each), belongs to another split, or cannot
            be read.
    """
    paths = list_shards(first)
    if len(paths) > 1 and (missing := [p for p in paths if not p.is_file()]):
        raise InputError(
            *(f"{p}: missing; expected {len(paths)} shards beside {first.name}" for p in missing)
        )
    headers = tuple(read_header(p) for p in paths)
    if len(headers) > 1:
        for no, header in enumerate(headers):
            expected = no, len(headers)
            actual = header.metadata.get("split.no"), header.metadata.get("split.count")
            if actual != expected:
                raise InputError(
                    f"{header.path}: split.no, split.count: expected {expected}, found {actual}"
                )
    return headers


def _hash_range(f: BinaryIO, start: int, size: int) -> str:
    f.seek(start)
    digest = hashlib.sha256()
    while size:
        chunk = f.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise InputError(f"{f.name}: ends early, {size} bytes of a tensor are missing")
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


class _HeaderReader:
    """Reads the head of one file, from front to back."""

    def __init__(self, f: BinaryIO, path: Path) -> None:
        self.f, self.path, self.size = f, path, os.fstat(f.fileno()).st_size
        self.head_end = min(self.size, HEAD_BYTES)

    def read_header(self) -> Header:
        if (magic := self.read_bytes(4, "magic")) != MAGIC:
            self.fail("magic", repr(MAGIC), repr(magic))
        if (version := self.read_number("I", "version")) != VERSION:
            self.fail("version", VERSION, version)
        # A tensor takes at least 24 bytes: a name's length, dimensions, type and offset; a key 12.
        n_tensors, n_keys = self.read_count(24, "tensor count"), self.read_count(12, "key count")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            if not (key := self.read_string("a key")):
                self.fail("a key", "a name", "nothing")
            if key in metadata:
                self.fail(f"key {key!r}", "once", "twice")
            # ggml refuses another type too (gguf_init_from_reader in ggml/src/gguf.cpp).
            if (kind := self.read_number("I", key)) != UINT32 and key == "general.alignment":
                self.fail(key, "a 32-bit number", f"type {kind}")
            metadata[key] = self.read_value(kind, key)
        tensors = tuple(self.read_tensor() for _ in range(n_tensors))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        # docs/gguf.md asks for a multiple of 8, gguf.cpp for a power of two.
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
            # Exactly one layout is valid: a gap would hide bytes, an overlap would share them.
            if t.offset != expected:
                self.fail(f"offset of tensor {t.name}", expected, t.offset)
            if start + t.offset + t.bytes > self.size:
                self.fail(
                    f"tensor {t.name}",
                    f"data up to byte {start + t.offset + t.bytes}",
                    f"{self.size} bytes",
                )
            expected += pad(t.bytes, alignment)

    def read_tensor(self) -> TensorSpec:
        name = self.read_string("a tensor name")
        if len(name.encode()) > MAX_NAME_BYTES:
            self.fail(f"tensor name {name}", f"at most {MAX_NAME_BYTES} bytes", len(name.encode()))
        if not 1 <= (dims := self.read_number("I", f"dimensions of {name}")) <= MAX_DIMS:
            self.fail(f"dimensions of {name}", f"1 to {MAX_DIMS}", dims)
        shape = tuple(self.read_number("Q", f"shape of {name}") for _ in range(dims))
        if (type_id := self.read_number("I", f"type of {name}")) not in BY_ID:
            self.fail(f"type of {name}", "a ggml type", type_id)
        ggml_type = BY_ID[type_id]
        # Python's unbounded ints on purpose: a product of 64 bits would wrap on a crafted shape.
        # No type stores a weight in less than an eighth of a byte, which bounds the product.
        if math.prod(shape) < 1 or math.prod(shape) > 8 * self.size * ggml_type.block:
            self.fail(f"shape of {name}", "a tensor that fits the file", shape)
        if not ggml_type.fits(shape[0]):
            self.fail(
                f"row of {name}", f"a multiple of {ggml_type.block} for {ggml_type.name}", shape[0]
            )
        return TensorSpec(name, shape, ggml_type, self.read_number("Q", f"offset of {name}"))

    def read_value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.read_number(SCALARS[kind], key)
        if kind == STRING:
            return self.read_string(key)
        if kind != ARRAY:
            self.fail(f"type of {key}", "a GGUF value type", kind)
        return list(self.read_array(key))

    def read_array(self, key: str) -> Iterator[Any]:
        kind = self.read_number("I", key)
        if kind in SCALARS:
            n = self.read_count(struct.calcsize(SCALARS[kind]), key)
            yield from struct.unpack(
                f"<{n}{SCALARS[kind]}", self.read_bytes(n * struct.calcsize(SCALARS[kind]), key)
            )
        elif kind == STRING:
            for _ in range(self.read_count(8, key)):
                yield self.read_string(key)
        else:
            # Arrays of arrays too: docs/gguf.md has them, but gguf.cpp refuses to read them.
            self.fail(f"element type of {key}", "a scalar or a string", kind)

    def read_count(self, least_bytes: int, what: str) -> int:
        """Return a count of things that take at least so many bytes each.

        The rest of the head must be able to hold them, so that no count makes the reader allocate
        more memory than the file has bytes.
        """
        n: int = self.read_number("Q", what)
        rest = max(self.head_end - self.f.tell(), 0)
        if n * least_bytes > rest:
            self.fail(what, f"at most {rest // least_bytes}", n)
        return n

    def read_number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.read_bytes(struct.calcsize(code), what))[0]

    def read_string(self, what: str) -> str:
        raw = self.read_bytes(self.read_count(1, f"length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(what, "UTF-8", raw[:20])

    def read_bytes(self, size: int, what: str) -> bytes:
        data = self.f.read(size)
        if len(data) != size:
            self.fail(what, f"{size} bytes", f"the end of the file after {len(data)}")
        return data

    def fail(self, what: str, expected: Any, actual: Any) -> NoReturn:
        raise InputError(f"{self.path}: {what}: expected {expected}, found {actual}")
