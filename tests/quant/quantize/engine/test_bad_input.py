"""What stops a run: the error says what and where, no final name is left, and a rerun continues."""

import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.core.errors import CheckError, InputError, ToolError
from quant.quantize.engine import chunks, journal
from quant.quantize.engine.job import EngineJob
from quant.quantize.engine.run import run_engine
from quant.quantize.engine.work import quantize_job
from tests.quant.quantize.engine.models import (
    MATRIX_NAME,
    SHAPES,
    job,
    replace_weight,
    types,
    write_base,
    write_matrix,
)

pytestmark = pytest.mark.tools

NAN, INFINITE = 0x7FC0, 0xFF80


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model, its imatrix, and two variants."""
    folder = tmp_path_factory.mktemp("model")
    write_matrix(folder / MATRIX_NAME, write_base(folder / "base.gguf"))
    quantize_job(
        job(folder / "base.gguf", folder / MATRIX_NAME, list_variants(folder, folder)), folder
    )
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """Return a copy of base and imatrix that may be damaged."""
    for name in ("base.gguf", MATRIX_NAME):
        shutil.copy(model / name, tmp_path)
    return tmp_path


def list_variants(model: Path, folder: Path) -> dict[Path, dict[str, str]]:
    return {folder / f"{t}.gguf": types(model / "base.gguf", t) for t in ("Q4_K", "Q8_0")}


def make_copy_job(folder: Path) -> EngineJob:
    return job(
        folder / "base.gguf", folder / MATRIX_NAME, list_variants(folder, folder / "out"), jobs=2
    )


def assert_nothing_final(folder: Path) -> None:
    assert not list((folder / "out").glob("*.gguf"))


def assert_written(folder: Path, model: Path) -> None:
    for name in ("Q4_K.gguf", "Q8_0.gguf"):
        assert (folder / "out" / name).read_bytes() == (model / name).read_bytes()


@pytest.fixture
def plant_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes the engine's process run some lines first."""

    def plant(lines: str) -> None:
        driver, python = tmp_path / "driver.py", tmp_path / "python"
        driver.write_text(
            f"import sys\nfrom pathlib import Path\nfrom quant.quantize.engine import output, weights, work, worker\n{lines}\n"
            "from quant.core import child\nchild.run_job(worker.quantize_in_child)\n"
        )
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {driver} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return plant


@pytest.mark.parametrize("bits", [NAN, INFINITE])
def test_weights_that_are_not_finite_are_counted_and_the_first_is_named(
    copy: Path, model: Path, bits: int
) -> None:
    name = "blk.0.ffn_down_exps.weight"
    for at in (30_000, 30_001, 100_000):
        replace_weight(copy / "base.gguf", name, at, bits)
    with pytest.raises(
        InputError, match=rf"base.gguf: tensor {name}: 3 of 129280 weights .*, the first at 30000"
    ):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)


def test_a_tensor_that_is_only_copied_is_checked_too(copy: Path) -> None:
    replace_weight(copy / "base.gguf", "output.weight", 5, NAN)
    chosen = types(copy / "base.gguf", "BF16")
    with pytest.raises(InputError, match=r"tensor output.weight: 1 of \d+ weights"):
        quantize_job(job(copy / "base.gguf", None, {copy / "out" / "x.gguf": chosen}), copy)
    assert_nothing_final(copy)


def test_an_imatrix_of_another_model_is_refused(copy: Path) -> None:
    others = {name.replace("blk.0.", "blk.1."): shape for name, shape in SHAPES.items()}
    write_matrix(copy / MATRIX_NAME, write_base(copy / "other.gguf", others))
    with pytest.raises(
        InputError,
        match=r"imatrix: of another model; it has data for blk\.1\.attn_output\.weight, .* and 1 more",
    ):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)


def test_an_imatrix_of_a_wider_model_is_refused_with_every_tensor(copy: Path) -> None:
    wider = {name: (2 * shape[0], *shape[1:]) for name, shape in SHAPES.items()}
    write_matrix(copy / MATRIX_NAME, write_base(copy / "other.gguf", wider))
    with pytest.raises(InputError) as refused:
        quantize_job(make_copy_job(copy), copy)
    lines = [p for p in refused.value.problems if "values, one for each column" in p]
    assert len(lines) == 8
    assert any(
        "blk.0.ffn_up_exps.weight: of another model; expected 5 x 512 values" in p
        and "found 5120" in p
        for p in lines
    )


def test_all_types_that_cannot_be_used_are_reported_at_once(copy: Path) -> None:
    chosen = types(copy / "base.gguf", "Q4_K") | {
        "blk.10.ffn_down.weight": "IQ2_XXS",
        "output.weight": "Q9",
        "blk.0.exp_probs_b.bias": "Q8_0",
    }
    with pytest.raises(InputError) as refused:
        quantize_job(
            job(copy / "base.gguf", copy / MATRIX_NAME, {copy / "out" / "x.gguf": chosen}), copy
        )
    text = str(refused.value)
    assert len(refused.value.problems) == 3
    assert "blk.10.ffn_down.weight: IQ2_XXS needs imatrix data" in text
    assert "output.weight: expected a type of ggml, found Q9" in text
    assert "exp_probs_b.bias: expected a row that is a multiple of 32" in text


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 64 * 2**20)
    )
    with pytest.raises(InputError, match=r"out: expected [\d,]+ bytes free, found 67,108,864"):
        quantize_job(make_copy_job(copy), copy)
    assert not list((copy / "out").iterdir())


def test_a_limit_on_the_length_of_files_is_reported(
    copy: Path, plant_code: Callable[[str], None]
) -> None:
    plant_code("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))")
    with pytest.raises(InputError, match=r"the file grew too large"):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)


def test_a_disk_that_fills_up_is_reported_and_a_rerun_continues(
    copy: Path, model: Path, plant_code: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    plant_code(
        "import resource\nreal, calls = output.VariantOutput.write_chunk, []\n"
        "def write(*args):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 15: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))\n"
        "    real(*args)\n"
        "output.VariantOutput.write_chunk = write"
    )
    with pytest.raises(
        InputError,
        match=r"(Q4_K|Q8_0).gguf.partial: the file grew too large; free some and run again",
    ):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)
    left = journal.journal_path(copy / "out" / "Q4_K.gguf").stat().st_size
    assert left > journal.HEAD.size + 3 * journal.RECORD.size
    monkeypatch.setattr(sys, "executable", python)
    run_engine(make_copy_job(copy), copy / "work")
    assert_written(copy, model)


def test_a_base_that_is_cut_short_is_refused(copy: Path) -> None:
    with (copy / "base.gguf").open("r+b") as f:
        f.truncate((copy / "base.gguf").stat().st_size - 100)
    with pytest.raises(InputError, match=r"base.gguf: tensor"):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)


def test_a_base_that_is_cut_short_during_the_run_is_reported(
    copy: Path, plant_code: Callable[[str], None]
) -> None:
    plant_code(
        "import os\nreal = weights.WeightSource.read_rows\n"
        "def raw(source, tensor, chunk):\n    os.truncate(source.file.path, 8000)\n    return real(source, tensor, chunk)\n"
        "weights.WeightSource.read_rows = raw"
    )
    with pytest.raises(
        InputError,
        match=r"base.gguf: tensor .*: expected \d+ bytes at byte \d+, found \d+; it was cut short",
    ):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)


@pytest.mark.parametrize("changed", ["base.gguf", MATRIX_NAME])
def test_a_file_that_is_written_to_during_the_run_is_reported(
    copy: Path, plant_code: Callable[[str], None], changed: str
) -> None:
    plant_code(
        "real = work.EngineRun.run\n"
        f"def run(*args):\n    real(*args)\n    f = open({str(copy / changed)!r}, 'r+b'); f.write(b'GGUF'); f.close()\n"
        "work.EngineRun.run = run"
    )
    with pytest.raises(InputError, match=f"{changed}: changed while it was read"):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)


def test_a_base_that_is_replaced_during_the_run_is_reported(
    copy: Path, plant_code: Callable[[str], None]
) -> None:
    plant_code(
        "import shutil\nreal = work.EngineRun.run\n"
        f"def run(*args):\n    real(*args)\n    shutil.copy({str(copy / 'base.gguf')!r}, {str(copy / 'b')!r})\n"
        f"    Path({str(copy / 'b')!r}).replace({str(copy / 'base.gguf')!r})\n"
        "work.EngineRun.run = run"
    )
    with pytest.raises(InputError, match=r"base.gguf: changed while it was read"):
        run_engine(make_copy_job(copy), copy / "work")


def test_an_abort_in_ggml_names_the_tensor_and_keeps_finished_chunks(
    copy: Path, model: Path, plant_code: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    name = "blk.0.attn_q.weight"
    before = (copy / "base.gguf").read_bytes()
    replace_weight(copy / "base.gguf", name, 300, NAN)
    base = copy / "base.gguf"
    # It is the last of all with its cost, so other tensors are finished when it ends the process.
    chosen = types(base, "Q8_0") | {name: "IQ2_XS"}
    request = job(base, copy / MATRIX_NAME, {copy / "out" / "x.gguf": chosen}, jobs=1)
    plant_code(
        "work.all_finite = lambda rows: True\nwork.order_work = lambda pieces: sorted(pieces, key=lambda p: p.cost)"
    )
    with pytest.raises(
        InputError, match=rf"tensor {name}: rows \d+ to \d+: 1 of \d+ blocks cannot be made IQ2_XS"
    ):
        run_engine(request, copy / "work")
    assert_nothing_final(copy)
    monkeypatch.setenv("QUANT_KERNELS", "ggml")
    with pytest.raises(ToolError) as ended:
        run_engine(request, copy / "work")
    assert "the quantizer was ended by SIGABRT" in str(ended.value)
    assert f"in work was tensor {name} as IQ2_XS" in str(ended.value)
    assert_nothing_final(copy)
    assert (
        journal.journal_path(copy / "out" / "x.gguf").stat().st_size
        > journal.HEAD.size + 3 * journal.RECORD.size
    )
    base.write_bytes(before)
    monkeypatch.setattr(sys, "executable", python)
    run_engine(request, copy / "work")
    anew = job(base, copy / MATRIX_NAME, {copy / "anew" / "x.gguf": chosen})
    run_engine(anew, copy / "work-anew")
    assert (copy / "out" / "x.gguf").read_bytes() == (copy / "anew" / "x.gguf").read_bytes()


def test_stored_rows_that_ggml_finds_invalid_are_an_error(
    copy: Path, plant_code: Callable[[str], None]
) -> None:
    plant_code(
        "from quant.llama import ggml\nreal = ggml.Library.kernel\n"
        "def kernel(library, kind):\n"
        "    def broken(rows, weights):\n"
        "        data = real(library, kind)(rows, weights)\n        data[0:2] = (0x00, 0x7C)\n        return data\n"
        "    return broken\n"
        "ggml.Library.kernel = kernel"
    )
    with pytest.raises(
        CheckError, match=r"tensor .*: rows \d+ to \d+ are not valid as (Q4_K|Q8_0)"
    ):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)


def test_a_failed_flush_removes_the_journal(copy: Path, plant_code: Callable[[str], None]) -> None:
    plant_code(
        "import os, errno, time\nwork.FLUSH_SECONDS = 0.001\nreal = output.VariantOutput.sync\n"
        "def sync(self):\n"
        "    if self.journal.records > self.journal.marked:\n"
        "        def fails(fd): raise OSError(errno.EIO, 'Input/output error')\n"
        "        os.fdatasync = fails\n"
        "    real(self)\n"
        "output.VariantOutput.sync = sync\n"
        "raw = weights.WeightSource.read_rows\n"
        "def slow(*args):\n    time.sleep(0.02)\n    return raw(*args)\n"
        "weights.WeightSource.read_rows = slow"
    )
    with pytest.raises(ToolError, match="Input/output error"):
        run_engine(make_copy_job(copy), copy / "work")
    assert_nothing_final(copy)
    assert len(list((copy / "out").glob("*.journal"))) < 2


def test_a_folder_without_write_permission_is_reported(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kw: object) -> None:
        raise PermissionError(13, "Permission denied", str(copy / "work"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="work: cannot be written"):
        run_engine(make_copy_job(copy), copy / "work")


def test_a_journal_with_chunks_of_another_size_does_not_count(
    copy: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", 512 * 3)
    replace_weight(copy / "base.gguf", "token_embd.weight", 512 * 303 - 1, NAN)
    with pytest.raises(InputError, match="token_embd"):
        quantize_job(make_copy_job(copy), copy)
    shutil.copy(model / "base.gguf", copy)
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", 2**20)
    quantize_job(make_copy_job(copy), copy)
    assert_written(copy, model)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limits
