"""Importance matrix files are read, merged and written with the bytes of llama-imatrix."""

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from quant.calibration.imatrix_file import (
    ImatrixData,
    ImatrixEntry,
    find_model_problems,
    load_imatrix,
    merge_imatrices,
    save_imatrix,
)
from quant.core.errors import InputError
from quant.llama import toolchain
from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES
from tests.gguf_files import Tensor, key, write

KEYS = (
    key("general.type", "imatrix"),
    key("imatrix.datasets", ["calibration.txt"]),
    key("imatrix.chunk_count", 2),
    key("imatrix.chunk_size", 64),
)
DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight"


def matrix(seed: int = 0, name: str = "a.txt", experts: int = 3) -> ImatrixData:
    """Sums of very different sizes, so that every rounding shows."""
    random = np.random.default_rng(seed)

    def sums(n: int) -> "np.typing.NDArray[np.float32]":
        return np.exp(random.normal(0, 6, n)).astype(np.float32)

    counts = np.array([0, *random.integers(1, 5000, experts - 1)])
    entries = {
        EXPERTS: ImatrixEntry(sums(32 * experts), counts),
        DENSE: ImatrixEntry(sums(64), np.array([int(random.integers(1, 9000))])),
    }
    return ImatrixData(entries, (name,), 3, 512)


def by_the_tool(folder: Path, parts: list[str], out: str, *more: str) -> bytes:
    """Return what llama-imatrix merges from files in a folder."""
    command: list[str | Path] = [
        toolchain.find_toolchain().path("llama-imatrix"),
        "-m",
        "none",
        "--in-file",
        ",".join(parts),
        "-o",
        out,
        *more,
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return (folder / out).read_bytes()


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    for n in range(3):
        save_imatrix(matrix(n, f"{n}.txt"), tmp_path / f"{n}.gguf")
    return ["0.gguf", "1.gguf", "2.gguf"]


@pytest.mark.tools
@pytest.mark.parametrize("context", [512, 100])
def test_a_merge_has_the_bytes_of_llama_imatrix(
    parts: list[str], tmp_path: Path, context: int
) -> None:
    save_imatrix(
        merge_imatrices([load_imatrix(tmp_path / name) for name in parts], context),
        tmp_path / "mine.gguf",
    )
    assert (tmp_path / "mine.gguf").read_bytes() == by_the_tool(
        tmp_path, parts, "theirs.gguf", "-c", str(context)
    )


@pytest.mark.tools
def test_the_order_of_the_parts_is_the_order_of_the_roundings(
    parts: list[str], tmp_path: Path
) -> None:
    turned = [*parts[1:], parts[0]]
    save_imatrix(
        merge_imatrices([load_imatrix(tmp_path / name) for name in turned]), tmp_path / "mine.gguf"
    )
    assert (tmp_path / "mine.gguf").read_bytes() == by_the_tool(tmp_path, turned, "theirs.gguf")
    assert by_the_tool(tmp_path, parts, "other.gguf") != by_the_tool(
        tmp_path, turned, "theirs.gguf"
    )


@pytest.mark.tools
def test_the_older_form_becomes_the_gguf_that_llama_imatrix_makes_of_it(
    parts: list[str], tmp_path: Path
) -> None:
    by_the_tool(tmp_path, parts[1:], "old.dat", "--output-format", "dat")
    old = load_imatrix(tmp_path / "old.dat")
    assert old.legacy and old.datasets == ("2.txt",)
    save_imatrix(merge_imatrices([old]), tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_bytes() == by_the_tool(
        tmp_path, ["old.dat"], "theirs.gguf"
    )


@pytest.mark.tools
def test_old_and_new_forms_are_added_as_llama_imatrix_adds_them(
    parts: list[str], tmp_path: Path
) -> None:
    by_the_tool(tmp_path, parts[1:], "old.dat", "--output-format", "dat")
    for order in (["0.gguf", "old.dat", "1.gguf"], ["old.dat", "1.gguf"]):
        save_imatrix(
            merge_imatrices([load_imatrix(tmp_path / name) for name in order], 64),
            tmp_path / "mine.gguf",
        )
        assert (tmp_path / "mine.gguf").read_bytes() == by_the_tool(
            tmp_path, order, "theirs.gguf", "-c", "64"
        )


def test_a_saved_matrix_is_loaded_unchanged(tmp_path: Path) -> None:
    save_imatrix(matrix(), tmp_path / "m.gguf")
    loaded = load_imatrix(tmp_path / "m.gguf")
    assert (loaded.datasets, loaded.chunks, loaded.chunk_tokens, loaded.legacy) == (
        ("a.txt",),
        3,
        512,
        False,
    )
    assert loaded.counts() == matrix().counts()
    assert list(loaded.counts()) == [DENSE, EXPERTS]
    assert loaded.entries[EXPERTS].sums.tolist() == matrix().entries[EXPERTS].sums.tolist()


def test_parts_of_different_sizes_are_refused() -> None:
    with pytest.raises(
        InputError,
        match=rf"part 2: {EXPERTS}: expected 96 values as in the parts before, found 128",
    ):
        merge_imatrices([matrix(), matrix(experts=4)])


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def sums(shape: tuple[int, ...] = (2,), data: bytes | None = None, kind: str = "F32") -> Tensor:
    return Tensor(
        "blk.0.a.weight.in_sum2", shape, kind, data=floats(1, 2) if data is None else data
    )


COUNT = Tensor("blk.0.a.weight.counts", (1,), data=floats(3))
FAULTS = [
    ("no matrices", [Tensor("a.weight")], "expected an importance matrix .*found none"),
    (
        "sums alone",
        [sums()],
        r"blk.0.a.weight: expected .in_sum2 and .counts, found only one of them",
    ),
    (
        "counts alone",
        [COUNT],
        r"blk.0.a.weight: expected .in_sum2 and .counts, found only one of them",
    ),
    (
        "other numbers",
        [sums((32,), bytes(34), "Q8_0"), COUNT],
        "in_sum2: expected numbers in F32, found Q8_0",
    ),
    (
        "not a number",
        [sums(data=floats(1, float("nan"))), COUNT],
        "expected finite numbers, found nan at value 1",
    ),
    (
        "infinite",
        [sums(data=floats(float("inf"), 1)), COUNT],
        "expected finite numbers, found inf at value 0",
    ),
    (
        "negative",
        [sums(data=floats(1, -2)), COUNT],
        r"expected sums of squares, found -2.0 at value 1",
    ),
    (
        "count is no number",
        [sums(), Tensor("blk.0.a.weight.counts", (1,), data=floats(float("nan")))],
        "counts of tokens",
    ),
    (
        "experts",
        [sums(), Tensor("blk.0.a.weight.counts", (1, 3), data=floats(1, 1, 1))],
        "each of 3 experts, found 2",
    ),
]


@pytest.mark.parametrize(
    ("tensors", "problem"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_broken_values_are_reported_with_file_and_tensor(
    tensors: list[Tensor], problem: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", tensors, KEYS)
    with pytest.raises(InputError, match=problem) as caught:
        load_imatrix(path)
    assert str(path) in str(caught.value)


def legacy(*entries: tuple[str, int, list[float]], end: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += (
            struct.pack("<i", len(name))
            + name.encode()
            + struct.pack("<ii", calls, len(values))
            + floats(*values)
        )
    return data + end


END = struct.pack("<ii", 7, 5) + b"a.txt"


def test_a_dat_file_is_read_with_and_without_its_end(tmp_path: Path) -> None:
    for end, chunks, names in ((END, 7, ("a.txt",)), (b"", 0, ())):
        (tmp_path / "m.dat").write_bytes(legacy(("blk.0.a.weight", 7, [1, 2, 3]), end=end))
        loaded = load_imatrix(tmp_path / "m.dat")
        assert (loaded.chunks, loaded.datasets, loaded.counts()) == (
            chunks,
            names,
            {"blk.0.a.weight": (7,)},
        )
        assert loaded.entries["blk.0.a.weight"].sums.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "number of entries: expected 4 bytes at byte 0, found 0"),
        (b"some text of a person", "neither GGUF nor .dat"),
        (struct.pack("<i", 0), "number of entries: expected at least 1, found 0"),
        (legacy(("a", 1, [1.0]))[:-1], "a: expected 4 bytes at byte 17, found 3"),
        (legacy(("a", 1, [float("nan")])), "a: expected finite numbers, found nan"),
        (legacy(("a", -1, [1.0])), "a: chunks: expected at least 0, found -1"),
        (legacy(("a", 1, [1.0]), end=END + b"x"), "found 1 bytes more"),
        (legacy(("a", 1, [1.0]), end=END[:-1]), "name of the text: expected 5 bytes"),
    ],
)
def test_a_broken_dat_file_is_reported(data: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(data)
    with pytest.raises(InputError, match=problem):
        load_imatrix(tmp_path / "m.dat")


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_imatrix(tmp_path / "m.gguf")


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, shape, TYPES["BF16"])


def test_a_matrix_of_the_model_has_no_problems() -> None:
    model = (spec(DENSE, 64, 8), spec(EXPERTS, 32, 8, 3), spec("blk.2.attn_q.weight", 64, 8))
    assert list(find_model_problems(matrix().sizes(), model, "m.gguf")) == []


def test_a_matrix_of_another_model_is_reported() -> None:
    assert list(find_model_problems(matrix().sizes(), (spec(DENSE, 64, 8),), "m.gguf")) == [
        f"m.gguf: of another model; it has data for {EXPERTS}, which this model lacks"
    ]
    [wide, experts] = find_model_problems(
        matrix().sizes(), (spec(DENSE, 96, 8), spec(EXPERTS, 32, 8, 4)), "m.gguf"
    )
    assert wide.startswith(f"m.gguf: {DENSE}: ") and wide.endswith(
        "expected 1 x 96 values, one for each column, found 64"
    )
    assert experts.endswith("expected 4 x 32 values, one for each column, found 96")
