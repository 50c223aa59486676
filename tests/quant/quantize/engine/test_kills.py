"""A run that is killed: the same run again ends in the same bytes, and a final name never held anything else."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quant.llama.gguf import read_header
from quant.llama.tensors import sort_tensors
from quant.quantize.engine import chunks, journal
from quant.quantize.engine import job as jobs
from quant.quantize.engine.job import EngineJob
from quant.quantize.engine.output import read_finished, record_path
from quant.quantize.engine.work import SPARE, EngineRun, quantize_job
from tests.quant.quantize.engine.models import MATRIX_NAME, job, types, write_base, write_matrix

pytestmark = pytest.mark.tools

FEW_WEIGHTS = 512 * 40
TYPES = ("Q8_0", "Q4_K", "F16")
MOMENTS = 50

DRIVER = f"""
import os, signal, sys
from pathlib import Path
from quant.quantize.engine import chunks, job, work

chunks.CHUNK_WEIGHTS = {FEW_WEIGHTS}
work.FLUSH_SECONDS = 0.01
moment, count = int(sys.argv[2]), 0

def watched(name):
    real = getattr(os, name)
    def call(*args, **kw):
        global count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)
    setattr(os, name, call)

for name in ("open", "ftruncate", "pwrite", "write", "fdatasync", "fsync", "replace", "unlink"):
    watched(name)
path = Path(sys.argv[1])
work.quantize_job(job.read_job(path), path.parent)
print(count)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its imatrix."""
    folder = tmp_path_factory.mktemp("model")
    write_matrix(folder / MATRIX_NAME, write_base(folder / "base.gguf"))
    return folder


def told(model: Path, folder: Path) -> EngineJob:
    """Three variants that share some work, in that folder, one of them in shards."""
    base = model / "base.gguf"
    wanted = {folder / f"{t}.gguf": types(base, t) for t in TYPES}
    wanted[folder / "Q4_K.gguf"]["output.weight"] = "Q8_0"
    doing = job(base, model / MATRIX_NAME, wanted, jobs=2)
    first, *rest = doing.wanted
    return replace(doing, wanted=(replace(first, max_bytes=200_000), *rest))


def drive(doing: EngineJob, moment: int) -> subprocess.CompletedProcess[str]:
    """Run the job, killed before its so manyth call of the system."""
    path = doing.wanted[0].path.parent / "job.json"
    path.parent.mkdir(exist_ok=True)
    jobs.write_job(path, doing)
    return subprocess.run(
        [sys.executable, "-c", DRIVER, path, str(moment)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def again(doing: EngineJob) -> None:
    """What is not there yet, as :func:`quant.quantize.engine.run.run_engine` does it."""
    todo = tuple(w for w in doing.wanted if not read_finished(w.path, doing.identity))
    if todo:
        quantize_job(EngineJob(**{**vars(doing), "wanted": todo}), doing.wanted[0].path.parent)


def test_fifty_moments(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", FEW_WEIGHTS)
    whole = told(model, tmp_path / "whole")
    done = drive(whole, 0)
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.gguf")}
    assert len(expected) > len(TYPES) + 1
    records = {w.path.name: record_path(w.path).read_bytes() for w in whole.wanted}
    continued = 0
    for n in range(MOMENTS):
        folder = tmp_path / f"{n}"
        doing = told(model, folder)
        # The last calls vary with the threads, so the latest moments may pass by; a run that was not killed ends well.
        killed = drive(doing, 1 + n * (calls - 1) // (MOMENTS - 1))
        assert killed.returncode == -9 or n >= MOMENTS - 2, killed.stderr
        for final in folder.glob("*.gguf"):
            assert final.read_bytes() == expected[final.name], (n, final.name)
        for left in folder.glob("*.journal"):
            continued += left.stat().st_size > journal.HEAD.size + 2 * journal.RECORD.size
        again(doing)
        assert {p.name: p.read_bytes() for p in folder.glob("*.gguf")} == expected, n
        assert {w.path.name: record_path(w.path).read_bytes() for w in doing.wanted} == records, n
        assert not [*folder.glob("*.partial"), *folder.glob("*.journal")]
    assert continued > MOMENTS  # most of them left something to go on with


def test_at_most_the_chunks_in_work_are_done_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", FEW_WEIGHTS)
    todo: list[int] = []
    real = EngineRun.missing

    def counted(run: EngineRun) -> list[chunks.Piece]:
        pieces = real(run)
        todo.append(sum(len(p.types) for p in pieces))
        return pieces

    monkeypatch.setattr(EngineRun, "missing", counted)
    calls = int(drive(told(model, tmp_path / "a"), 0).stdout)
    again(told(model, tmp_path / "b"))
    doing = told(model, tmp_path / "c")
    assert drive(doing, calls * 2 // 3).returncode == -9
    names = [t.name for t in sort_tensors(read_header(model / "base.gguf").tensors)]
    kept = {
        (t, c, w.types[names[t]])
        for w in doing.wanted
        for t, c in _records(journal.journal_path(w.path))
    }
    again(doing)
    whole, rest = todo
    threads = 2 + SPARE
    # A thread that was killed may have written a chunk to some of the files that want its type, and not to all.
    assert len(kept) > whole // 3
    assert 0 < rest <= whole - len(kept) + threads


def _records(path: Path) -> list[tuple[int, int]]:
    data = path.read_bytes()
    found = [
        journal.RECORD.unpack_from(data, at)
        for at in range(journal.HEAD.size, len(data) - 31, journal.RECORD.size)
    ]
    return [(r[0], r[1]) for r in found if r[0] != journal.MARK]
