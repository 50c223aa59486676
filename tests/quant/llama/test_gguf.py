"""GGUF heads: what gguf-py writes is read back, faults are refused by name, no byte breaks the reader."""

import hashlib
import resource
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.core.errors import InputError
from quant.llama.gguf import Header, list_shards, pad, read_header, read_headers
from tests.gguf_files import (
    ARRAY,
    LLAMA,
    TWO,
    UINT32,
    UINT64,
    Key,
    Tensor,
    array,
    content,
    key,
    text,
    write,
)
from tests.processes import PATIENCE_SECONDS

A, B = TWO
HUGE = 2**62

FAULTS: Sequence[tuple[str, dict[str, Any], str]] = [
    # the fault, how to make it, what the error says
    ("an empty file", {"cut": 10**6}, "magic"),
    ("another magic", {"magic": b"GGML"}, "magic: expected"),
    ("version 0", {"version": 0}, "version: expected 3, found 0"),
    ("version 1", {"version": 1}, "version: expected 3, found 1"),
    ("version 2", {"version": 2}, "version: expected 3, found 2"),
    ("version 4", {"version": 4}, "version: expected 3, found 4"),
    ("big-endian", {"version": 3 << 24}, "version: expected 3"),
    ("more tensors than bytes", {"n_tensors": HUGE}, "tensor count: expected at most"),
    ("one tensor too many", {"n_tensors": 3}, "expected"),
    ("more keys than bytes", {"n_keys": HUGE}, "key count: expected at most"),
    ("one key too many", {"n_keys": len(LLAMA) + 1}, "expected"),
    ("ends in the counts", {"cut": -12}, "tensor count"),
    ("a key twice", {"keys": [*LLAMA, LLAMA[0]]}, "'general.architecture': expected once"),
    ("a key without a name", {"keys": [key("", 1)]}, "a key: expected a name"),
    (
        "a key longer than the file",
        {"keys": [Key("k", UINT32, b"", HUGE)]},
        "length of a key: expected at most",
    ),
    ("a key that is no UTF-8", {"keys": [key(b"\xff\xfe", 1)]}, "a key: expected UTF-8"),
    (
        "a value of unknown type",
        {"keys": [Key("k", 13, bytes(4))]},
        "type of k: expected a GGUF value type, found 13",
    ),
    (
        "a string longer than the file",
        {"keys": [Key("k", 8, text("x", HUGE))]},
        "length of k: expected at most",
    ),
    (
        "a string that is no UTF-8",
        {"keys": [key("k", "x"), Key("l", 8, text(b"\xc3("))]},
        "l: expected UTF-8",
    ),
    (
        "an array longer than the file",
        {"keys": [Key("k", ARRAY, array(UINT32, HUGE, b""))]},
        "k: expected at most",
    ),
    (
        "an array of strings too long",
        {"keys": [Key("k", ARRAY, array(8, 2**40, b""))]},
        "k: expected at most",
    ),
    (
        "an array of arrays",
        {"keys": [Key("k", ARRAY, array(ARRAY, 1, bytes(64)))]},
        "element type of k",
    ),
    (
        "an array of unknown type",
        {"keys": [Key("k", ARRAY, array(77, 1, bytes(64)))]},
        "element type of k: expected a scalar or a string, found 77",
    ),
    (
        "alignment 0",
        {"keys": [key("general.alignment", 0)]},
        "general.alignment: expected a power of two",
    ),
    (
        "alignment 13",
        {"keys": [key("general.alignment", 13)]},
        "general.alignment: expected a power of two",
    ),
    (
        "alignment as text",
        {"keys": [key("general.alignment", "32")]},
        "general.alignment: expected",
    ),
    (
        "alignment of another width",
        {"keys": [Key("general.alignment", UINT64, struct.pack("<Q", 32))]},
        "general.alignment: expected",
    ),
    (
        "alignment as truth",
        {"keys": [key("general.alignment", True)]},
        "general.alignment: expected",
    ),
    ("alignment that is not kept", {"keys": [key("general.alignment", 64)]}, "expected"),
    (
        "a name longer than the file",
        {"tensors": [Tensor(name_length=HUGE)]},
        "length of a tensor name: expected at most",
    ),
    ("a name of 64 letters", {"tensors": [Tensor("n" * 64)]}, "expected at most 63 bytes"),
    ("a name that is no UTF-8", {"tensors": [Tensor(b"\xff")]}, "a tensor name: expected UTF-8"),
    ("a tensor twice", {"tensors": [A, A]}, "tensor a.weight: expected once, found twice"),
    (
        "no dimensions",
        {"tensors": [Tensor(shape=(), data=bytes(4))]},
        "dimensions of a.weight: expected 1 to 4, found 0",
    ),
    (
        "five dimensions",
        {"tensors": [Tensor(shape=(2,) * 5)]},
        "dimensions of a.weight: expected 1 to 4, found 5",
    ),
    (
        "2^32-1 dimensions",
        {"tensors": [Tensor(dims=2**32 - 1)]},
        "dimensions of a.weight: expected 1 to 4",
    ),
    ("a dimension of zero", {"tensors": [Tensor(shape=(32, 0))]}, "shape of a.weight"),
    (
        "a product of 2^64",
        {"tensors": [Tensor(shape=(2**32, 2**32), data=b"")]},
        "shape of a.weight: expected a tensor that fits",
    ),
    (
        "a product that wraps to 64",
        {"tensors": [Tensor(shape=(2**63 + 32, 2), data=b"")]},
        "shape of a.weight: expected a tensor that fits",
    ),
    (
        "a negative dimension",
        {"tensors": [Tensor(shape=(2**64 - 1, 1), data=b"")]},
        "shape of a.weight: expected a tensor that fits",
    ),
    (
        "a type that was removed",
        {"tensors": [Tensor(type_id=4)]},
        "type of a.weight: expected a ggml type, found 4",
    ),
    (
        "a type of the future",
        {"tensors": [Tensor(type_id=999)]},
        "type of a.weight: expected a ggml type, found 999",
    ),
    (
        "a row of half a block",
        {"tensors": [Tensor(shape=(48, 2), type="Q8_0")]},
        "row of a.weight: expected a multiple of 32 for Q8_0, found 48",
    ),
    (
        "an offset that is not aligned",
        {"tensors": [A, Tensor("b", offset=257)]},
        "offset of tensor b: expected 256, found 257",
    ),
    (
        "an offset beyond the file",
        {"tensors": [A, Tensor("b", offset=HUGE)]},
        "offset of tensor b: expected 256",
    ),
    (
        "a byte claimed by two",
        {"tensors": [A, Tensor("b", offset=0)]},
        "offset of tensor b: expected 256, found 0",
    ),
    (
        "a first offset of 32",
        {"tensors": [Tensor(offset=32)]},
        "offset of tensor a.weight: expected 0, found 32",
    ),
    ("data cut by a tensor", {"cut": 100}, "tensor b.weight: expected data up to byte"),
    (
        "data cut by a block",
        {"tensors": [A], "cut": 4},
        "tensor a.weight: expected data up to byte",
    ),
    ("no data at all", {"tensors": [A], "cut": 256}, "tensor a.weight: expected data up to byte"),
]


def write_broken(path: Path, faults: dict[str, Any]) -> Path:
    if faults.get("cut", 0) < 0:  # minus the number of bytes that are left
        path.write_bytes(content()[: -faults["cut"]])
        return path
    return write(path, **faults)


@pytest.mark.parametrize(("faults", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_broken_file_is_refused_by_name(
    tmp_path: Path, faults: dict[str, Any], message: str
) -> None:
    path = write_broken(tmp_path / "broken.gguf", faults)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{path}: ")
    assert message in caught.value.problems[0]


def test_the_sound_file_behind_the_faults_is_read(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "whole.gguf"))
    assert [(t.name, t.shape, t.type.name, t.offset) for t in header.tensors] == [
        ("a.weight", (32, 2), "F32", 0),
        ("b.weight", (64, 2), "Q8_0", 256),
    ]
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ü"]
    assert header.architecture == "llama"
    assert header.elements == 32 * 2 + 64 * 2


def test_a_file_without_keys_and_tensors_is_read(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "empty.gguf", [], []))
    assert header == Header(tmp_path / "empty.gguf", {}, (), 32)


def test_the_padding_after_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    odd = Tensor("a", (3,), "F32")
    assert read_header(write(tmp_path / "f.gguf", [odd], cut=20)).by_name["a"].bytes == 12


def test_another_alignment_is_respected(tmp_path: Path) -> None:
    keys = [key("general.alignment", 64)]
    header = read_header(
        write(tmp_path / "f.gguf", [Tensor("a", (8,)), Tensor("b", (8,))], keys, alignment=64)
    )
    assert header.data_start % 64 == 0
    assert header.by_name["b"].offset == 64


def test_a_missing_file_and_a_folder_are_input_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read") as caught:
            read_header(path)
        assert str(path) in str(caught.value)


def test_what_gguf_py_writes_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    values: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "x.u8": (200, gguf.GGUFValueType.UINT8),
        "x.i8": (-100, gguf.GGUFValueType.INT8),
        "x.u16": (60000, gguf.GGUFValueType.UINT16),
        "x.i16": (-30000, gguf.GGUFValueType.INT16),
        "x.u32": (4 * 10**9, gguf.GGUFValueType.UINT32),
        "x.i32": (-(2**31), gguf.GGUFValueType.INT32),
        "x.u64": (2**64 - 1, gguf.GGUFValueType.UINT64),
        "x.i64": (-(2**63), gguf.GGUFValueType.INT64),
        "x.f32": (0.5, gguf.GGUFValueType.FLOAT32),
        "x.f64": (0.1, gguf.GGUFValueType.FLOAT64),
        "x.yes": (True, gguf.GGUFValueType.BOOL),
        "x.no": (False, gguf.GGUFValueType.BOOL),
        "x.text": ("Grüße, 世界 🙂\n", gguf.GGUFValueType.STRING),
        "x.empty": ("", gguf.GGUFValueType.STRING),
    }
    arrays: dict[str, list[Any]] = {
        "y.ints": [1, -2, 3],
        "y.floats": [0.25, -8.0],
        "y.texts": ["", "ü", "<|user|>"],
    }
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "one": np.arange(7, dtype=np.float32),
        "blk.0.ffn_up_exps.weight": np.arange(4 * 3 * 64, dtype=np.float16).reshape(4, 3, 64),
        "four": np.ones((2, 3, 4, 5), dtype=np.float32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, (value, kind) in values.items():
        writer.add_key_value(name, value, kind)
    for name, array_value in arrays.items():
        writer.add_array(name, array_value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    quantized = gguf.quants.quantize(
        np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)

    expected = {name: value for name, (value, _) in values.items()} | arrays
    assert {k: v for k, v in header.metadata.items() if k[0] in "xy"} == expected
    assert header.architecture == "llama"
    assert {t.name: t.shape for t in header.tensors} == {
        name: tuple(reversed(data.shape)) for name, data in tensors.items()
    } | {"q": (128, 2)}
    assert header.by_name["q"].type.name == "Q8_0"
    raw = path.read_bytes()
    for t in header.tensors:
        start = header.data_start + t.offset
        data = quantized if t.name == "q" else tensors[t.name]
        assert raw[start : start + t.bytes] == data.tobytes()


def test_gguf_py_reads_the_same_from_what_the_builder_writes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.gguf", [*TWO, Tensor("c", (256, 3, 2), "IQ1_S"), Tensor("d", (512,), "Q6_K")]
    )
    theirs = gguf.GGUFReader(path)
    ours = read_header(path)
    assert [
        (t.name, t.shape, t.type.id, ours.data_start + t.offset, t.bytes) for t in ours.tensors
    ] == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset), int(t.n_bytes))
        for t in theirs.tensors
    ]
    their_values = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == their_values


def test_the_digest_of_a_tensor_is_that_of_its_bytes(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "f.gguf"))
    assert header.hash_tensors() == {
        str(t.name): hashlib.sha256(t.bytes()).hexdigest() for t in TWO
    }


WHOLE = content()


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=12
    ),
    length=st.integers(0, len(WHOLE)),
    cut=st.booleans(),
)
def test_a_file_with_flipped_bytes_is_read_or_refused(
    tmp_path: Path, flips: list[tuple[int, int]], length: int, cut: bool
) -> None:
    raw = bytearray(WHOLE)
    for place, value in flips:
        raw[place] = value
    path = tmp_path / "flipped.gguf"
    path.write_bytes(raw[:length] if cut else raw)
    try:
        header = read_header(path)
    except InputError as e:
        assert str(path) in str(e)
    else:
        assert all(header.data_start + t.offset + t.bytes <= len(raw) for t in header.tensors)


HEAD_LENGTH = WHOLE.index(b"b.weight") + 40


@pytest.mark.parametrize("value", [0x00, 0x7F, 0xFF])
def test_no_single_byte_of_a_head_breaks_the_reader(tmp_path: Path, value: int) -> None:
    path = tmp_path / "flipped.gguf"
    for place in range(HEAD_LENGTH):
        raw = bytearray(WHOLE)
        raw[place] = value
        path.write_bytes(raw)
        try:
            read_header(path)
        except InputError as e:
            assert str(path) in str(e)


HUGE_COUNTS = {
    "a string of 50 GB": [Key("k", 8, text("x", 50 * 10**9))],
    "an array of 50 GB": [Key("k", ARRAY, array(0, 50 * 10**9, b""))],
    "an array of strings": [Key("k", ARRAY, array(8, 6 * 10**9, b""))],
}


@pytest.mark.parametrize("name", HUGE_COUNTS)
def test_a_huge_count_in_a_huge_file_takes_no_memory(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "sparse.gguf", [], HUGE_COUNTS[name])
    with path.open("r+b") as f:
        f.truncate(100 * 10**9)  # a sparse file: none of it is on the disk
    code = (
        "import resource, sys; from pathlib import Path; from quant.llama.gguf import read_header\n"
        "from quant.core.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        "try: read_header(Path(sys.argv[1]))\n"
        "except InputError as e: print(e)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert process.returncode == 0, process.stderr
    assert str(path) in process.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**21  # kB


def write_shards(folder: Path, *, no: int = 1, count: int = 2) -> Path:
    for n in (0, 1):
        keys = [key("split.no", no if n else 0), key("split.count", count if n else 2)]
        write(folder / f"m-{n + 1:05d}-of-00002.gguf", [TWO[n]], keys)
    return folder / "m-00001-of-00002.gguf"


def test_a_single_file_is_its_own_only_shard(tmp_path: Path) -> None:
    for name in (
        "model.gguf",
        "best-of-two.gguf",
        "m-00002-of-00003.gguf",
        "m-00001-of-0003.gguf",
        "m-00001-of-99999999999.gguf",
        "m-00001-of-00000.gguf",
        "m-00001-of-0000².gguf",
        "00001-of-00002.gguf",
    ):
        assert list_shards(tmp_path / name) == (tmp_path / name,)


def test_the_first_shard_stands_for_all(tmp_path: Path) -> None:
    first = write_shards(tmp_path)
    assert list_shards(first) == (first, tmp_path / "m-00002-of-00002.gguf")
    assert [t.name for h in read_headers(first) for t in h.tensors] == ["a.weight", "b.weight"]


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(InputError) as caught:
        read_headers(first)
    assert [p.split(": ")[0] for p in caught.value.problems] == [
        str(tmp_path / f"m-0000{n}-of-00003.gguf") for n in (2, 3)
    ]


@pytest.mark.parametrize("wrong", [{"no": 0}, {"count": 3}])
def test_a_shard_of_another_split_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(
        InputError, match=r"m-00002-of-00002.gguf: split.no, split.count: expected \(1, 2\), found"
    ):
        read_headers(write_shards(tmp_path, **wrong))


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 0), (1, 32), (32, 32), (33, 64), (2**60 + 1, 2**60 + 32)]
)
def test_padding_rounds_up_to_the_alignment(size: int, expected: int) -> None:
    assert pad(size) == expected
