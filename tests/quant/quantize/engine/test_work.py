"""One pass: each chunk is read once and quantized once per type; finished tensors are copied."""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.llama import ggml
from quant.llama.gguf import TensorSpec, read_header
from quant.llama.types import TYPES, GGMLType
from quant.quantize.engine import status
from quant.quantize.engine.chunks import Chunk
from quant.quantize.engine.job import EngineJob, EngineSettings, parse_reusable
from quant.quantize.engine.output import record_path
from quant.quantize.engine.reuse import ReusableFile
from quant.quantize.engine.weights import ColumnImportance, WeightSource
from quant.quantize.engine.work import quantize_job
from quant.quantize.kernels import Kernels
from tests.quant.quantize.engine.models import MATRIX_NAME, job, types, write_base, write_matrix

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model, its imatrix, and two variants."""
    folder = tmp_path_factory.mktemp("model")
    base = write_base(folder / "base.gguf")
    write_matrix(folder / MATRIX_NAME, base)
    quantize_job(
        job(
            base,
            folder / MATRIX_NAME,
            {folder / f"{t}.gguf": types(base, t) for t in ("Q4_K", "Q8_0")},
        ),
        folder,
    )
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[Any]]:
    """Count reads by tensor and chunk, and calls of kernels by type."""
    counts: Counter[Any] = Counter()
    lock = threading.Lock()
    real_read_rows, real_kernel = WeightSource.read_rows, Kernels.kernel

    def read_rows(source: WeightSource, tensor: TensorSpec, chunk: Chunk) -> ggml.Bytes:
        with lock:
            counts[tensor.name, chunk.index] += 1
        return real_read_rows(source, tensor, chunk)

    def kernel(kernels: Kernels, kind: GGMLType) -> ggml.Kernel:
        inner = real_kernel(kernels, kind)

        def counted(rows: ggml.Rows, weights: ggml.Rows | None) -> ggml.Bytes:
            with lock:
                counts[kind.name] += 1
            return inner(rows, weights)

        return counted

    monkeypatch.setattr(WeightSource, "read_rows", read_rows)
    monkeypatch.setattr(Kernels, "kernel", kernel)
    yield counts


def make_job(model: Path, out: Path, **variants: dict[str, str]) -> EngineJob:
    return job(
        model / "base.gguf",
        model / MATRIX_NAME,
        {out / f"{n}.gguf": t for n, t in variants.items()},
    )


def make_reusable(path: Path) -> ReusableFile:
    record = json.loads(record_path(path).read_text())
    return parse_reusable(path, record["tensors"])


def test_work_that_variants_share_is_done_once(
    model: Path, tmp_path: Path, calls: Counter[Any]
) -> None:
    base = model / "base.gguf"
    quantize_job(make_job(model, tmp_path, a=types(base, "Q8_0")), tmp_path)
    alone = calls["Q8_0"]
    calls.clear()
    mixed = types(base, "Q8_0") | {"output.weight": "Q4_K"}
    quantize_job(
        make_job(model, tmp_path, b=types(base, "Q8_0"), c=mixed, d=types(base, "Q8_0")), tmp_path
    )
    assert (calls["Q8_0"], calls["Q4_K"]) == (alone, 1)
    assert all(n == 1 for key, n in calls.items() if isinstance(key, tuple))
    expected = (tmp_path / "a.gguf").read_bytes()
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "d.gguf").read_bytes() == expected


def test_the_record_holds_every_tensors_digest(model: Path) -> None:
    path = model / "Q4_K.gguf"
    record = json.loads(record_path(path).read_text())
    assert {name: t["sha256"] for name, t in record["tensors"].items()} == read_header(
        path
    ).hash_tensors()
    assert {name: t["type"] for name, t in record["tensors"].items()} == types(
        model / "base.gguf", "Q4_K"
    )


def test_the_error_is_measured_on_some_rows(model: Path) -> None:
    records = {
        n: json.loads(record_path(model / f"{n}.gguf").read_text())["tensors"]
        for n in ("Q4_K", "Q8_0")
    }
    for name in ("output.weight", "blk.0.ffn_up_exps.weight", "blk.10.ffn_down.weight"):
        assert 0 < records["Q8_0"][name]["error"] < 1e-3 < records["Q4_K"][name]["error"] < 2e-2
    assert records["Q4_K"]["output_norm.weight"]["error"] == 0


def test_the_error_of_a_small_tensor_is_the_relative_weighted_mse_of_all_its_rows(
    tmp_path: Path,
) -> None:
    base = write_base(
        tmp_path / "base.gguf", {"token_embd.weight": (256, 3), "output.weight": (256, 6)}
    )
    matrix = write_matrix(tmp_path / MATRIX_NAME, base)
    quantize_job(job(base, matrix, {tmp_path / "x.gguf": types(base, "Q4_K")}), tmp_path)
    library, columns = (
        ggml.load_ggml(ggml.find_library(Path(job(base, None, {}).library).parent)),
        ColumnImportance.open(matrix),
    )
    spec, written = read_header(base).by_name["output.weight"], read_header(tmp_path / "x.gguf")
    original = library.to_float(
        spec.type, WeightSource.open(base).read_rows(spec, Chunk(0, 0, 0, 6)), 256
    ).astype(float)
    stored = np.fromfile(
        tmp_path / "x.gguf",
        np.uint8,
        written.by_name["output.weight"].bytes,
        offset=written.data_start + written.by_name["output.weight"].offset,
    )
    back = library.to_float(TYPES["Q4_K"], stored, 256).astype(float)
    weights = columns.columns(spec, 0)
    assert weights is not None
    expected = (weights * (back - original) ** 2).sum() / (weights * original**2).sum()
    error = json.loads(record_path(tmp_path / "x.gguf").read_text())["tensors"]["output.weight"][
        "error"
    ]
    assert error == pytest.approx(expected, rel=1e-4)


def test_tensors_of_a_finished_file_are_copied(
    model: Path, tmp_path: Path, calls: Counter[Any]
) -> None:
    changed = types(model / "base.gguf", "Q4_K") | {"output.weight": "Q6_K"}
    two = make_job(model, tmp_path, a=changed, c=changed)
    quantize_job(replace(two, reusable=(make_reusable(model / "Q4_K.gguf"),)), tmp_path)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    assert {k for k in calls if isinstance(k, str)} == {"Q6_K"}
    assert {name for name, _ in (k for k in calls if isinstance(k, tuple))} == {"output.weight"}
    copied = (tmp_path / "a.gguf").read_bytes()
    record = json.loads(record_path(tmp_path / "a.gguf").read_text())
    quantize_job(make_job(model, tmp_path, b=changed), tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == copied
    assert json.loads(record_path(tmp_path / "b.gguf").read_text())["tensors"] == record["tensors"]


def test_a_damaged_tensor_is_quantized_again(
    model: Path, tmp_path: Path, calls: Counter[Any]
) -> None:
    old = tmp_path / "old.gguf"
    old.write_bytes((model / "Q4_K.gguf").read_bytes())
    header = read_header(old)
    with old.open("r+b") as f:
        f.seek(header.data_start + header.by_name["output.weight"].offset + 1000)
        f.write(b"\x55\xaa")
    before = make_reusable(model / "Q4_K.gguf")
    request = replace(
        make_job(model, tmp_path, a=types(model / "base.gguf", "Q4_K")),
        reusable=(replace(before, path=old),),
    )
    quantize_job(request, tmp_path)
    assert {name for name, _ in (k for k in calls if isinstance(k, tuple))} == {"output.weight"}
    assert (tmp_path / "a.gguf").read_bytes() == (model / "Q4_K.gguf").read_bytes()


def test_without_copy_file_range_tensors_are_copied_through_memory(
    model: Path, tmp_path: Path, calls: Counter[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: int) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    request = replace(
        make_job(model, tmp_path, a=types(model / "base.gguf", "Q4_K")),
        reusable=(make_reusable(model / "Q4_K.gguf"),),
    )
    quantize_job(request, tmp_path)
    assert not calls
    assert (tmp_path / "a.gguf").read_bytes() == (model / "Q4_K.gguf").read_bytes()


def test_a_reusable_file_that_is_gone_is_ignored(model: Path, tmp_path: Path) -> None:
    before = replace(make_reusable(model / "Q4_K.gguf"), path=tmp_path / "gone.gguf")
    quantize_job(
        replace(
            make_job(model, tmp_path, a=types(model / "base.gguf", "Q4_K")), reusable=(before,)
        ),
        tmp_path,
    )
    assert (tmp_path / "a.gguf").read_bytes() == (model / "Q4_K.gguf").read_bytes()


def test_threads_and_memory_change_no_byte(model: Path, tmp_path: Path) -> None:
    for n, settings in enumerate(
        (EngineSettings(1), EngineSettings(5), EngineSettings(3, memory=1))
    ):
        path = tmp_path / f"{n}.gguf"
        request = job(
            model / "base.gguf", model / MATRIX_NAME, {path: types(model / "base.gguf", "Q4_K")}
        )
        quantize_job(replace(request, settings=settings), tmp_path)
        assert path.read_bytes() == (model / "Q4_K.gguf").read_bytes()


def test_tensors_in_work_are_listed_once_while_they_are_in_work(tmp_path: Path) -> None:
    path = tmp_path / "status"
    work = status.WorkStatus(path)
    with work.show(0, "a as Q4_K"), work.show(2, "b as Q4_K"), work.show(3, "a as Q4_K"):
        assert status.read_in_work(path) == ("a as Q4_K", "b as Q4_K")
    assert status.read_in_work(path) == ()
    assert status.read_in_work(tmp_path / "none") == ()
