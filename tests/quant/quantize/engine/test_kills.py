"""A killed run: the same run again gives the same bytes, and final names never hold others."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from quant.core import child
from quant.llama.gguf import read_header
from quant.llama.tensors import sort_tensors
from quant.quantize.engine import chunks, journal
from quant.quantize.engine.job import EngineJob
from quant.quantize.engine.output import record_path, recover_record
from quant.quantize.engine.work import EXTRA_THREADS, EngineRun, quantize_job
from tests.quant.quantize.engine.models import MATRIX_NAME, job, types, write_base, write_matrix

pytestmark = pytest.mark.tools

FEW_WEIGHTS = 512 * 40
TYPES = ("Q8_0", "Q4_K", "F16")
KILLS = 50

DRIVER = f"""
import json, os, signal, sys
from pathlib import Path
from quant.quantize.engine import chunks, job, work

chunks.CHUNK_WEIGHTS = {FEW_WEIGHTS}
work.FLUSH_SECONDS = 0.01
kill_at, count = int(sys.argv[2]), 0

def count_calls(name):
    real = getattr(os, name)
    def call(*args, **kw):
        global count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)
    setattr(os, name, call)

for name in ("open", "ftruncate", "pwrite", "write", "fdatasync", "fsync", "replace", "unlink"):
    count_calls(name)
path = Path(sys.argv[1])
work.quantize_job(job.parse_job(json.loads(path.read_text())), path.parent)
print(count)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model and its imatrix."""
    folder = tmp_path_factory.mktemp("model")
    write_matrix(folder / MATRIX_NAME, write_base(folder / "base.gguf"))
    return folder


def make_kill_job(model: Path, folder: Path) -> EngineJob:
    """Return a job for three variants in a folder that share some work, one of them in shards."""
    base = model / "base.gguf"
    variants = {folder / f"{t}.gguf": types(base, t) for t in TYPES}
    variants[folder / "Q4_K.gguf"]["output.weight"] = "Q8_0"
    job_to_kill = job(base, model / MATRIX_NAME, variants, jobs=2)
    first, *rest = job_to_kill.variants
    return replace(job_to_kill, variants=(replace(first, max_bytes=200_000), *rest))


def run_and_kill(job_to_kill: EngineJob, kill_at: int) -> subprocess.CompletedProcess[str]:
    """Run the job in a process that is killed before its n-th system call; 0 kills it never."""
    path = job_to_kill.variants[0].path.parent / "job.json"
    path.parent.mkdir(exist_ok=True)
    child.write_job("quant.quantize.engine.worker", asdict(job_to_kill), path.parent)
    return subprocess.run(
        [sys.executable, "-c", DRIVER, path, str(kill_at)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_again(job_to_kill: EngineJob) -> None:
    """Write what is missing, in this process, as :func:`quant.quantize.engine.run.run_engine` does."""
    todo = tuple(
        w for w in job_to_kill.variants if not recover_record(w.path, job_to_kill.identity)
    )
    if todo:
        quantize_job(replace(job_to_kill, variants=todo), job_to_kill.variants[0].path.parent)


def test_a_run_that_is_killed_at_fifty_moments_is_continued(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", FEW_WEIGHTS)
    whole = make_kill_job(model, tmp_path / "whole")
    done = run_and_kill(whole, 0)
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.gguf")}
    assert len(expected) > len(TYPES) + 1
    records = {w.path.name: record_path(w.path).read_bytes() for w in whole.variants}
    continued = 0
    for n in range(KILLS):
        folder = tmp_path / f"{n}"
        job_to_kill = make_kill_job(model, folder)
        # The last calls vary with the threads, so the latest moments may pass by; a run that was not killed ends well.
        killed = run_and_kill(job_to_kill, 1 + n * (calls - 1) // (KILLS - 1))
        assert killed.returncode == -9 or n >= KILLS - 2, killed.stderr
        for final in folder.glob("*.gguf"):
            assert final.read_bytes() == expected[final.name], (n, final.name)
        for left in folder.glob("*.journal"):
            continued += left.stat().st_size > journal.HEAD.size + 2 * journal.RECORD.size
        run_again(job_to_kill)
        assert {p.name: p.read_bytes() for p in folder.glob("*.gguf")} == expected, n
        assert {
            w.path.name: record_path(w.path).read_bytes() for w in job_to_kill.variants
        } == records, n
        assert not [*folder.glob("*.partial"), *folder.glob("*.journal")]
    assert continued > KILLS  # most of them left something to go on with


def test_only_the_chunks_in_work_are_done_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_WEIGHTS", FEW_WEIGHTS)
    missing: list[int] = []
    real = EngineRun.list_missing_work

    def counted(run: EngineRun) -> list[chunks.WorkItem]:
        items = real(run)
        missing.append(sum(len(item.types) for item in items))
        return items

    monkeypatch.setattr(EngineRun, "list_missing_work", counted)
    calls = int(run_and_kill(make_kill_job(model, tmp_path / "a"), 0).stdout)
    run_again(make_kill_job(model, tmp_path / "b"))
    job_to_kill = make_kill_job(model, tmp_path / "c")
    assert run_and_kill(job_to_kill, calls * 2 // 3).returncode == -9
    names = [t.name for t in sort_tensors(read_header(model / "base.gguf").tensors)]
    kept = {
        (t, c, w.types[names[t]])
        for w in job_to_kill.variants
        for t, c in _records(journal.journal_path(w.path))
    }
    run_again(job_to_kill)
    whole, rest = missing
    threads = 2 + EXTRA_THREADS
    # A thread that was killed may have written a chunk to some of the files that want its type, and not to all.
    assert len(kept) > whole // 3
    assert 0 < rest <= whole - len(kept) + threads


def _records(path: Path) -> list[tuple[int, int]]:
    data = path.read_bytes()
    records = [
        journal.RECORD.unpack_from(data, at)
        for at in range(journal.HEAD.size, len(data) - 31, journal.RECORD.size)
    ]
    return [(r[0], r[1]) for r in records if r[0] != journal.MARK]
