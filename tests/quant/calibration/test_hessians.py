"""Hessians, compared with llama-imatrix, which sums their diagonals; and what is refused."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.calibration import hessians, imatrix_file
from quant.calibration.hessian_collector import HessianCollector
from quant.calibration.hessian_file import Hessians
from quant.calibration.hessians import HessianSettings, collect_hessians
from quant.core import disk, files, memory
from quant.core.errors import InputError, ToolError
from quant.llama.ggml_graph import GraphTensor
from quant.llama.gguf import read_header
from quant.llama.toolchain import find_toolchain
from tests.quant.quantize.engine.models import write_base

RNG = np.random.default_rng(1)
CHUNKS = 4
Tiny = tuple[Path, Path, Path]


# ---- what is refused before anything begins


def test_too_little_memory_or_disk_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base.gguf")
    (tmp_path / "text").write_text("x")
    monkeypatch.setattr(memory, "measure_free_memory", lambda: 2_097_151)
    monkeypatch.setattr(disk, "measure_free_space", lambda _: 1_048_575)
    with pytest.raises(InputError) as refused:
        collect_hessians(
            base, tmp_path / "text", tmp_path / "m", HessianSettings(only="output.weight")
        )
    of_memory, of_disk = refused.value.problems
    assert (
        "expected 2,097,152 bytes of memory, found 2,097,151 free; take some tensors at a time with --only"
        in of_memory
    )
    assert (
        f"{tmp_path / 'm'}: expected 1,048,576 bytes free on its disk, found 1,048,575" in of_disk
    )


@pytest.mark.parametrize(
    ("only", "problem"),
    [
        (
            r"blk\.0\.attn_q",
            r"base\.gguf: expected matrices called .*, as output\.weight is, found none",
        ),
        (
            "token_embd.weight",
            "found none",
        ),  # nothing is multiplied with it: the model has an output of its own
        ("(", r"--only: expected a regular expression, found '\('"),
    ],
)
def test_only_has_to_match_a_matrix(only: str, problem: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    with pytest.raises(InputError, match=problem):
        collect_hessians(base, tmp_path / "none", tmp_path / "m", HessianSettings(only=only))


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    with pytest.raises(InputError, match="none: cannot be read"):
        collect_hessians(base, tmp_path / "none", tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ---- the sums


class FakeLibrary(SimpleNamespace):
    """A library whose tensors are all in main memory."""

    matmul, expert_matmul = 1, 2

    def is_host(self, _: GraphTensor) -> bool:
        return True


def tensor(values: NDArray[Any], name: str = "", **fields: Any) -> GraphTensor:
    """Return the ggml_tensor of an array. Dimensions of one are put in front."""
    shape, strides = (
        (1,) * (4 - values.ndim) + values.shape,
        (0,) * (4 - values.ndim) + values.strides,
    )
    head = GraphTensor(type=0, data=values.ctypes.data, name=name.encode(), **fields)
    head.ne[:], head.nb[:] = shape[::-1], strides[::-1]
    return head


def node(op: int, *src: GraphTensor) -> GraphTensor:
    head = GraphTensor(op=op)
    head.src[: len(src)] = [ctypes.addressof(s) for s in src]
    return head


def watcher(experts: int, n: int) -> HessianCollector:
    return HessianCollector(FakeLibrary(), {"a.weight": (experts, n)})  # type: ignore[arg-type]


def test_each_matrix_of_a_tensor_sums_the_inputs_that_ggml_broadcasts_it_to() -> None:
    x = RNG.integers(-9, 9, (2, 6, 5, 4)).astype(np.float32)  # 2 x 6 inputs for 1 x 3 matrices
    weight, inputs = tensor(np.ones((3, 7, 4), np.float32), "a.weight"), tensor(x)
    collector, product = watcher(3, 4), node(1, weight, inputs)
    assert collector(ctypes.addressof(product), True, None) and collector(
        ctypes.addressof(product), False, None
    )
    expected = np.zeros((3, 4, 4))
    for i3, i2 in np.ndindex(2, 6):
        expected[i2 // 2] += x[i3, i2].T @ x[i3, i2]  # ggml_compute_forward_mul_mat: i02 = i12 / r2
    assert np.array_equal(collector.sums.products["a.weight"], expected)
    assert [*collector.sums.counts["a.weight"]] == [2 * 2 * 5] * 3


@pytest.mark.parametrize("rows", [1, 3], ids=["a row for all experts of a token", "a row for each"])
def test_each_expert_sums_its_own_rows(rows: int) -> None:
    ids = RNG.integers(0, 5, (50, 8)).astype(np.int32)[
        :, :3
    ]  # of a longer row, as the router's order is
    x = RNG.integers(-9, 9, (50, rows, 4)).astype(np.float32)
    weight, inputs, chosen = (
        tensor(np.ones((6, 7, 4), np.float32), "a.weight"),
        tensor(x),
        tensor(ids),
    )
    collector, product = watcher(6, 4), node(2, weight, inputs, chosen)
    for _ in range(2):
        assert collector(ctypes.addressof(product), False, None)
    expected, counts = np.zeros((6, 4, 4)), np.zeros(6, int)
    for t, place in np.ndindex(50, 3):
        expected[ids[t, place]] += 2 * np.outer(x[t, place % rows], x[t, place % rows])
        counts[ids[t, place]] += 2
    assert np.array_equal(collector.sums.products["a.weight"], expected)
    assert [*collector.sums.counts["a.weight"]] == [*counts]
    assert counts[5] == 0
    assert collector.sums.tensors().keys() == {"a.weight", "a.weight.counts"}
    assert not watcher(6, 4).sums.tensors()


def test_a_failure_is_kept_and_ends_the_computation() -> None:
    x = np.ones((3, 4), np.float32)
    x[1, 2] = np.inf
    collector, inputs, weight = (
        watcher(1, 4),
        tensor(x),
        tensor(np.ones((7, 4), np.float32), "a.weight"),
    )
    product = node(1, weight, inputs)
    with np.errstate(invalid="ignore"):
        assert not collector(ctypes.addressof(product), False, None)
    assert "a.weight: its inputs are NaN or infinite" in str(collector.failure)
    stranger = tensor(np.ones((7, 4), np.float32), "b.weight")
    assert not collector(ctypes.addressof(node(1, stranger, inputs)), True, None)
    assert not collector(ctypes.addressof(node(3, weight, inputs)), True, None)


# ---- with llama.cpp


@pytest.fixture(scope="module")
def collector(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Hessians, imatrix_file.ImatrixData]:
    """The Hessians of the tiny model, and what llama-imatrix sums over the same chunks."""
    base, _, text = tiny
    folder = tmp_path_factory.mktemp("hessians")
    result = collect_hessians(
        base, text, folder / "m.safetensors", HessianSettings(chunks=CHUNKS, gradients=False)
    )
    command: list[str | Path] = [
        "-m",
        base,
        "-f",
        text,
        "-o",
        "i.gguf",
        "--chunks",
        str(CHUNKS),
        "-t",
        "2",
        "--no-ppl",
    ]
    command += ["--parse-special", "--process-output", "-c", "512", "-b", "512", "-ub", "512"]
    find_toolchain().run("llama-imatrix", command, cwd=folder, log=folder / "log")
    return result, imatrix_file.load_imatrix(folder / "i.gguf")


@pytest.mark.tools
def test_the_diagonal_equals_the_sums_of_llama_imatrix(
    collector: tuple[Hessians, imatrix_file.ImatrixData],
) -> None:
    result, expected = collector
    assert {
        "output.weight",
        "blk.1.ffn_down_exps.weight",
        "blk.1.attn_q.weight",
    } <= result.counts.keys()
    assert result.counts.keys() <= expected.entries.keys()
    for name, counts in result.counts.items():
        entry = expected.entries[name]
        assert [*counts] == [*entry.counts], name
        for expert, sums in enumerate(entry.sums.reshape(len(counts), -1)):
            mean = result.read_mean(name, expert)
            assert (mean is None) == (counts[expert] < 32)
            if mean is not None:
                assert np.allclose(mean.diagonal(), sums / counts[expert], rtol=1e-5, atol=0), (
                    name,
                    expert,
                )


@pytest.mark.tools
def test_every_matrix_of_the_trunk_has_a_hessian(
    collector: tuple[Hessians, imatrix_file.ImatrixData],
    tiny: Tiny,
) -> None:
    result, base = collector[0], tiny[0]
    assert (
        result.counts.keys()
        == hessians._select_matrices(base, read_header(base).tensors, None, embedding=False).keys()
    )
    assert not [
        n
        for n in result.counts
        if ".nextn." in n or "norm" in n or "gate_inp" in n or n.startswith("token_embd")
    ]
    assert {n: result.columns(n) for n in result.counts} == {
        n: read_header(base).by_name[n].shape[0] for n in result.counts
    }
    about = {"form", "base", "text", "context", "chunks", "llama.cpp"}
    assert result.about.keys() == about
    assert (result.about["base"], result.about["chunks"]) == (files.hash_file(base), CHUNKS)


@pytest.mark.tools
def test_hessians_are_symmetric_and_positive_semidefinite(
    collector: tuple[Hessians, imatrix_file.ImatrixData],
) -> None:
    for name, counts in collector[0].counts.items():
        for expert in range(len(counts)):
            mean = collector[0].read_mean(name, expert)
            if mean is not None:
                assert np.array_equal(mean, mean.T), name
                values = np.linalg.eigvalsh(mean.astype(np.float64))
                assert values[-1] > 0
                assert values[0] > -1e-6 * values[-1], name


@pytest.mark.tools
def test_only_some_matrices_are_written_with_the_bytes_that_they_have_among_all(
    collector: tuple[Hessians, imatrix_file.ImatrixData],
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    base, _, text = tiny
    name = "blk.1.ffn_down_exps.weight"
    paths = tmp_path / "one", tmp_path / "other"
    result = [
        collect_hessians(
            base,
            text,
            p,
            HessianSettings(chunks=CHUNKS, gradients=False, only=r"blk\.1\.ffn_down_exps\.weight"),
        )
        for p in paths
    ]
    assert [*result[0].counts] == [name]
    assert np.array_equal(result[0].read_mean(name, 0), collector[0].read_mean(name, 0))  # type: ignore[arg-type]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]
    with pytest.raises(
        InputError, match="one: of another model: expected Hessians of the base 123"
    ):
        Hessians.open(paths[0], "123")


@pytest.mark.tools
def test_a_text_without_a_whole_chunk_is_refused_and_leaves_no_file(
    tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("def double(x):\n")
    with pytest.raises(
        InputError, match="short: expected at least one chunk of 512 tokens, found fewer"
    ):
        collect_hessians(tiny[0], tmp_path / "short", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["short"]


@pytest.mark.tools
def test_a_model_with_nan_is_refused_with_the_matrix(tiny: Tiny, tmp_path: Path) -> None:
    header = read_header(tiny[0])
    data = bytearray(tiny[0].read_bytes())
    start = header.data_start + header.by_name["token_embd.weight"].offset
    data[start : start + header.by_name["token_embd.weight"].bytes] = b"\xc0\x7f" * (
        header.by_name["token_embd.weight"].elements
    )
    (tmp_path / "broken.gguf").write_bytes(data)
    with pytest.raises(ToolError, match=r"blk\.0\.attn_q\.weight: its inputs are NaN or infinite"):
        collect_hessians(
            tmp_path / "broken.gguf",
            tiny[2],
            tmp_path / "m",
            HessianSettings(chunks=1, gradients=False, only=".*attn_q.*"),
        )
