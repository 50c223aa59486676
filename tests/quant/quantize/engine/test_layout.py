"""Where the bytes of a file lie, compared with the header reader and gguf-py."""

from pathlib import Path
from typing import Any

import gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.llama.gguf import TensorSpec, pad, read_header, read_headers
from quant.llama.types import TYPES
from quant.quantize.engine.layout import (
    FileLayout,
    iterate_metadata,
    make_imatrix_metadata,
    make_layout,
)
from tests.gguf_files import ARRAY, LLAMA, STRING, Key, Tensor, array, content, key, text, write

NAMES = (
    "token_embd.weight",
    "output.weight",
    "blk.10.a.weight",
    "blk.2.b.weight",
    "blk.2.a.weight",
    "blk.0.c.weight",
)
COMPUTED = ("general.quantization_version", "general.file_type")
QUANTIZE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def lay_out(
    base: Path,
    types: dict[str, str],
    imatrix_metadata: dict[str, Any] | None = None,
    max_bytes: int | None = None,
) -> FileLayout:
    header = read_header(base)
    return make_layout(
        header,
        base.read_bytes()[: header.head_bytes],
        types,
        "Q4_K_M",
        imatrix_metadata or {},
        max_bytes,
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, str]]:
    """Draw tensors in any order, and a type for each."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, len(NAMES)))]
    shapes = st.tuples(st.sampled_from((256, 512, 768)), st.integers(1, 5), st.integers(1, 3)).map(
        lambda s: s[:2] if s[2] == 1 else s
    )
    tensors = [Tensor(name, draw(shapes), draw(st.sampled_from(("F32", "BF16")))) for name in names]
    return tensors, {
        name: draw(st.sampled_from(("Q8_0", "Q4_K", "IQ1_S", "Q6_K", "BF16"))) for name in names
    }


@QUANTIZE
@given(models())
def test_a_file_of_a_layout_has_the_requested_tensors(
    tmp_path: Path, model: tuple[list[Tensor], dict[str, str]]
) -> None:
    tensors, types = model
    base = write(tmp_path / "base.gguf", tensors)
    layout = lay_out(base, types)
    path = tmp_path / "written.gguf"
    path.write_bytes(layout.heads[0] + bytes(layout.bytes - len(layout.heads[0])))
    header = read_header(path)  # refuses gaps, overlaps and tensors beyond the end
    assert header.data_start == len(layout.heads[0]) and len(layout.heads[0]) % 32 == 0
    assert {t.name: t.type.name for t in header.tensors} == types
    assert [header.data_start + t.offset for t in header.tensors] == [
        t.offset for t in layout.tensors
    ]
    last = header.tensors[-1]
    assert layout.bytes == header.data_start + pad(last.offset + last.bytes)
    theirs = gguf.GGUFReader(path).tensors
    assert [(t.name, t.data_offset, t.tensor_type) for t in theirs] == [
        (t.name, t.offset, t.type.id) for t in layout.tensors
    ]
    shapes = {str(t.name): t.shape for t in tensors}
    for t in header.tensors:
        asked = shapes[t.name]
        assert t.shape == asked or (asked[len(t.shape) :] == (1,) * (len(asked) - len(t.shape)))


@QUANTIZE
@given(models(), st.integers(12_000, 40_000))
def test_shards_hold_every_tensor_once_in_order_up_to_the_limit(
    tmp_path: Path, model: tuple[list[Tensor], dict[str, str]], limit: int
) -> None:
    tensors, types = model
    base = write(tmp_path / "base.gguf", tensors)
    whole, cut = lay_out(base, types), lay_out(base, types, max_bytes=limit)
    written: list[TensorSpec] = []
    for name, head, size in zip(cut.file_names("M"), cut.heads, cut.sizes, strict=True):
        (tmp_path / name).write_bytes(head + bytes(size - len(head)))
        header = read_header(tmp_path / name)
        written += header.tensors
        assert size - header.data_start <= limit or len(header.tensors) == 1
    assert [(t.name, t.type) for t in written] == [(t.name, t.type) for t in whole.tensors]
    headers = read_headers(
        tmp_path / cut.file_names("M")[0]
    )  # refuses shards that do not count alike
    assert {h.metadata["split.tensors.count"] for h in headers} == {len(tensors)}
    assert read_header(base).metadata.items() <= headers[0].metadata.items()


def test_tensors_are_ordered_by_block_number_not_by_its_digits(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf", [Tensor(name, (256, 2)) for name in NAMES])
    layout = lay_out(base, dict.fromkeys(NAMES, "Q8_0"))
    assert [t.name for t in layout.tensors] == [
        "output.weight",
        "token_embd.weight",
        "blk.0.c.weight",
        "blk.2.a.weight",
        "blk.2.b.weight",
        "blk.10.a.weight",
    ]


def test_added_keys_come_last_and_split_keys_are_dropped(tmp_path: Path) -> None:
    base_keys = [
        key("general.file_type", 32),
        key("split.no", 0),
        key("split.count", 1),
        key("split.tensors.count", 1),
        *LLAMA,
        key("general.quantization_version", 1),
        key("last", 1.5),
    ]
    base = write(tmp_path / "base.gguf", [Tensor()], base_keys)
    imatrix_metadata = make_imatrix_metadata(
        {"imatrix.datasets": ["d" * 200], "imatrix.chunk_count": 3}, 12, "imatrix.gguf"
    )
    layout = lay_out(base, {"a.weight": "F32"}, imatrix_metadata)
    path = tmp_path / "written.gguf"
    path.write_bytes(layout.heads[0] + bytes(layout.bytes - len(layout.heads[0])))
    written = read_header(path).metadata
    original = read_header(base).metadata
    kept = [k for k in original if k not in COMPUTED and not k.startswith("split.")]
    assert list(written) == [
        *kept,
        *COMPUTED,
        *(f"quantize.imatrix.{k}" for k in ("file", "dataset", "entries_count", "chunks_count")),
    ]
    assert all(written[k] == original[k] for k in kept)
    assert written["general.file_type"] == 15 and written["general.quantization_version"] == 2
    assert written["quantize.imatrix.dataset"] == "d" * 127
    assert (
        written["quantize.imatrix.entries_count"],
        written["quantize.imatrix.chunks_count"],
    ) == (
        12,
        3,
    )


def test_keys_that_an_imatrix_lacks_are_not_written(tmp_path: Path) -> None:
    assert make_imatrix_metadata({}, 3, "m") == {
        "quantize.imatrix.file": "m",
        "quantize.imatrix.entries_count": 3,
    }


VALUES = (
    st.integers(0, 2**32 - 1)
    | st.booleans()
    | st.floats(width=32, allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.text(max_size=3), min_size=1, max_size=4)
    | st.lists(st.integers(0, 9), min_size=1, max_size=4)
)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", min_codepoint=97), min_size=1, max_size=6),
        VALUES,
        max_size=5,
    )
)
def test_keys_are_copied_to_the_byte_up_to_the_first_zero_of_a_string(
    metadata: dict[str, Any],
) -> None:
    def through_c(value: Any) -> Any:
        if isinstance(value, str):
            return value.split("\0")[0]
        return [through_c(v) for v in value] if isinstance(value, list) else value

    head = content([], [key(k, v) for k, v in metadata.items()])
    expected = content([], [key(k, through_c(v)) for k, v in metadata.items()])
    copied = list(iterate_metadata(head))
    assert [name for name, _ in copied] == list(metadata)
    assert b"".join(raw for _, raw in copied) == expected[24:].rstrip(b"\0").ljust(
        sum(len(raw) for _, raw in copied), b"\0"
    )


def test_empty_arrays_of_strings_are_copied(tmp_path: Path) -> None:
    head = content([], [Key("none", ARRAY, array(STRING, 0, b"")), Key("x", STRING, text("y"))])
    assert [name for name, _ in iterate_metadata(head)] == ["none", "x"]


def test_another_type_or_offset_changes_the_digest(tmp_path: Path) -> None:
    tensors = [Tensor("a.weight", (256, 2)), Tensor("b.weight", (256, 2))]
    base, other = write(tmp_path / "a.gguf", tensors), write(tmp_path / "b.gguf", tensors[::-1])
    types = {"a.weight": "Q8_0", "b.weight": "Q4_K"}
    assert lay_out(base, types).digest == lay_out(base, types).digest
    assert (
        lay_out(base, types).digest
        != lay_out(base, {"a.weight": "Q4_K", "b.weight": "Q8_0"}).digest
    )
    assert lay_out(base, types).digest != lay_out(other, types).digest
    assert lay_out(base, types).tensors[0].source == TensorSpec(
        "a.weight", (256, 2), TYPES["F32"], 0
    )
