"""The threads of a run: each takes a piece, reads its rows once, and writes them in every type to every file.

There is one thread more than cores are to be kept busy, so that one computes where another waits for the disk or wakes;
a thread holds one piece and nothing else, which bounds the memory. What comes soon is asked for before it is its turn.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING

from quant.core import files
from quant.core.format import to_pretty_json
from quant.errors import CheckError, InputError, raise_problems
from quant.llama import ggml
from quant.llama.ggml import Bytes, Kernel, Library, Rows
from quant.llama.types import FLOATS, TYPES, GGMLType
from quant.quantize.engine import job as jobs
from quant.quantize.engine import slots
from quant.quantize.engine.chunks import Piece, estimate_costs, order_pieces, split_into_chunks
from quant.quantize.engine.job import EngineJob
from quant.quantize.engine.journal import BlockSums
from quant.quantize.engine.layout import HEAD, FileLayout, imatrix_keys, make_layout
from quant.quantize.engine.output import Output, WrittenFile
from quant.quantize.engine.reuse import ReusableTensors
from quant.quantize.engine.sample import Sample
from quant.quantize.engine.weights import ColumnImportance, WeightSource, finite
from quant.quantize.kernels import Kernels

if TYPE_CHECKING:
    from quant.quantize.gptq.compensator import ErrorCompensator

KERNELS = "kernels.json"
"""By what each type was quantised, and in which tensors a fault of ggml's was met; beside the job."""
SPARE = 1
"""Threads beside one for each core."""
AHEAD = 16
"""So many pieces before its turn, the disk is asked for the rows of one."""
FLUSH_SECONDS = 1.0
FIXED_BYTES = 96 * 2**20
"""Interpreter, numpy and the tables of the kernels: twice what the whole ladder was seen to take."""
WEIGHT_BYTES = 12
"""A piece in memory: its rows as stored, as floats, and quantised, with what numpy needs in between (7 were seen)."""
REFINED_BYTES, METRIC_BYTES = 64, 40
"""The same for a weight whose rounding is fed back, and for each pair of columns in its metric."""


def quantize_job(job: EngineJob, folder: Path) -> None:
    """Make the files of a job, whose process lives in ``folder``.

    Raises InputError or CheckFailed; then no file that was begun has its final name.
    """
    source = WeightSource.open(job.base)
    matrix = ColumnImportance.open(job.matrix) if job.matrix else None
    raise_problems(jobs.find_job_problems(job, source, matrix))
    layouts = {
        w.path: layout for w, layout in zip(job.wanted, _layouts(job, source, matrix), strict=True)
    }
    for path in layouts:
        path.parent.mkdir(parents=True, exist_ok=True)
    raise_problems(jobs.room_problems(layouts))
    outputs = [Output(layout, path, job.identity) for path, layout in layouts.items()]
    library = ggml.load_ggml(job.library)
    run = EngineRun(
        source,
        matrix,
        outputs,
        library,
        ReusableTensors(job.finished),
        slots.Slots(folder / slots.NAME),
        folder / slots.SHARE,
        _refiner(job.moments) if job.moments else None,
    )
    run.go(job.settings.threads, job.settings.memory)
    files.write_text(folder / KERNELS, to_pretty_json(run.fastest.report()))
    source.file.check_unchanged()
    if matrix:
        matrix.file.check_unchanged()
    for output in outputs:
        output.finish(run.made_of(output), {"identity": job.identity})
        output.close()


def _refiner(moments: Path) -> "ErrorCompensator":
    from quant.quantize.gptq.compensator import (
        ErrorCompensator,  # a run of ggml's bytes starts without it
    )

    return ErrorCompensator.open(moments)


def _layouts(
    job: EngineJob, source: WeightSource, matrix: ColumnImportance | None
) -> Iterator[FileLayout]:
    head = source.file.read(0, source.header.head_bytes, "head").tobytes()
    assert len(head) >= HEAD.size
    about = (
        imatrix_keys(matrix.header.metadata, len(matrix.entries), job.matrix_name) if matrix else {}
    )
    for wanted in job.wanted:
        yield make_layout(
            source.header, head, wanted.types, wanted.file_type, about, wanted.max_bytes
        )


@dataclass
class EngineRun:
    """What the threads share."""

    source: WeightSource
    matrix: ColumnImportance | None
    outputs: Sequence[Output]
    library: Library
    shelf: ReusableTensors
    slots: slots.Slots
    share: Path
    """Where it is told how much is done."""
    refiner: "ErrorCompensator | None" = None
    """What feeds rounding back, where that is wanted."""
    digests: dict[tuple[int, str], str] = field(default_factory=dict)
    """By tensor and type."""
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.tensors = self.outputs[0].layout.tensors
        self.index = {placed.name: i for i, placed in enumerate(self.tensors)}
        self.fastest = Kernels(self.library)
        self.kernels: dict[str, Kernel] = {}

    def go(self, jobs: int, memory: int) -> None:
        """Write all that is missing in the files. Raises what the first thread that failed raised."""
        with ThreadPoolExecutor(jobs) as copiers:  # hashing and copying let go of Python's lock
            list(
                copiers.map(
                    lambda tensor: self.shelf.fill(tensor, self.outputs), range(len(self.tensors))
                )
            )
        pieces = self.missing()
        for ggml_type in {t for p in pieces for t in p.types if t != p.tensor.type}:
            self.kernels[ggml_type.name] = self.fastest.kernel(ggml_type)
        here = estimate_costs(
            {name for name in self.kernels if self.fastest.served(TYPES[name]).by == "ggml"}
        )
        pieces = order_pieces([replace(p, costs=here) for p in pieces])
        self.left = Counter(self.index[p.tensor.name] for p in pieces)
        self.queue = deque(pieces)
        self.all_cost, self.done_cost = sum(p.cost for p in pieces), 0.0
        self.to_digest = deque(
            d for i in range(len(self.tensors)) if not self.left[i] for d in self.distinct(i)
        )
        n = min(jobs + SPARE, choose_threads(pieces, memory, refined=self.refiner is not None))
        threads = [threading.Thread(target=self.thread, args=(i,)) for i in range(n)]
        flusher = threading.Thread(target=self.flush)
        for thread in (*threads, flusher):
            thread.start()
        for thread in threads:
            thread.join()
        self.over.set()
        flusher.join()
        if self.failure:
            raise self.failure

    def missing(self) -> list[Piece]:
        """What is to be done, in the order of the file."""
        found = []
        for i, placed in enumerate(self.tensors):
            for chunk in split_into_chunks(placed.source):
                wanting = {
                    o.layout.tensors[i].type.name
                    for o in self.outputs
                    if (i, chunk.no) not in o.done
                }
                if wanting:
                    found.append(
                        Piece(placed.source, chunk, tuple(TYPES[name] for name in sorted(wanting)))
                    )
        return found

    def thread(self, no: int) -> None:
        """Do pieces until there are none, or another thread failed."""
        try:
            while not self.over.is_set():
                with self.lock:
                    complete = self.to_digest.popleft() if self.to_digest else None
                    piece = self.queue.popleft() if complete is None and self.queue else None
                    later = self.queue[AHEAD] if piece and len(self.queue) > AHEAD else None
                if later:
                    self.source.expect(later.tensor, later.chunk)
                if complete:
                    self.digest(*complete)
                elif piece:
                    self.do(piece, no)
                else:
                    return
        except BaseException as e:
            with self.lock:
                self.failure = self.failure or e
            self.over.set()

    def do(self, piece: Piece, no: int) -> None:
        """Read the rows of a piece, and write them wherever they are wanted."""
        tensor, chunk = piece.tensor, piece.chunk
        index = self.index[tensor.name]
        raw = self.source.raw(tensor, chunk)
        rows, columns, sample, metric = None, None, None, None
        if tensor.type.name in FLOATS:
            rows = self.library.to_float(tensor.type, raw, tensor.shape[0])
            if not finite(rows):
                raise InputError(self.source.non_finite(tensor, self.library))
            columns = self.matrix.columns(tensor, chunk.expert) if self.matrix else None
            metric = self.refiner.find_hessian(tensor, chunk.expert) if self.refiner else None
            sample = Sample.of(rows, columns, metric)
        for ggml_type in piece.types:
            if self.over.is_set():
                return
            if ggml_type == tensor.type:
                data, sums = raw, BlockSums(0.0, 0.0)
            else:
                assert rows is not None and sample is not None
                working = self.slots.working(no, f"{tensor.name} as {ggml_type.name}")
                with working, self.fastest.at(tensor.name):
                    data = self.quantized(piece, ggml_type, rows, columns)
                    if self.refiner and metric:
                        data = self.refiner.refine(ggml_type, rows, data, metric)
                sums = sample.loss(self.library, ggml_type, data)
            self.check(piece, ggml_type, data)
            for output in self.outputs:
                if (
                    output.layout.tensors[index].type == ggml_type
                    and (index, chunk.no) not in output.done
                ):
                    output.write(index, chunk, data, sums)
        with self.lock:
            self.done_cost += piece.cost
            self.left[index] -= 1
            if not self.left[index]:
                self.to_digest.extend(self.distinct(index))

    def quantized(
        self, piece: Piece, ggml_type: GGMLType, rows: Rows, columns: Rows | None
    ) -> Bytes:
        """The stored rows of a piece. Raises InputError for rows on which ggml would end the process."""
        try:
            return self.kernels[ggml_type.name](rows, columns)
        except InputError as e:
            raise InputError(*(f"{self.where(piece)}: {problem}" for problem in e.problems)) from e

    def check(self, piece: Piece, ggml_type: GGMLType, data: Bytes) -> None:
        """Raise CheckFailed for stored rows in which ggml finds something wrong."""
        if not self.library.is_valid(ggml_type, data):
            raise CheckError(f"{self.where(piece)} are not valid as {ggml_type.name}")

    def where(self, piece: Piece) -> str:
        """The rows of a piece, for people."""
        first = piece.chunk.first_row
        rows = f"rows {first} to {first + piece.chunk.rows - 1}"
        return f"{self.source.file.path}: tensor {piece.tensor.name}: {rows}"

    def distinct(self, tensor: int) -> Iterator[tuple[int, Output]]:
        """One file for every type that the files have a tensor in."""
        yield from {
            o.layout.tensors[tensor].type.name: (tensor, o) for o in reversed(self.outputs)
        }.values()

    def digest(self, tensor: int, output: Output) -> None:
        """The digest of a tensor that is complete; what lies on the disk is what is read."""
        self.digests[tensor, output.layout.tensors[tensor].type.name] = output.digest(tensor)

    def flush(self) -> None:
        """Every second, put what is written on the disk and mark it, and say how much is done."""
        try:
            while not self.over.wait(FLUSH_SECONDS):
                slots.report_slots(self.share, self.done_cost / max(self.all_cost, 1))
                for output in self.outputs:
                    output.sync()
        except OSError as e:
            with self.lock:
                self.failure = self.failure or e
            self.over.set()

    def made_of(self, output: Output) -> Mapping[str, WrittenFile]:
        """What every tensor of a complete file is."""
        made = {}
        for i, placed in enumerate(output.layout.tensors):
            sums = [output.done[i, c.no] for c in split_into_chunks(placed.source)]
            whole = fsum(s.whole for s in sums)
            error = fsum(s.error for s in sums) / whole if whole else 0.0
            # Six digits: the last ones depend on how numpy adds on this machine.
            made[placed.name] = WrittenFile(
                placed.type.name, self.digests[i, placed.type.name], float(f"{error:.6g}")
            )
        return made


def choose_threads(pieces: Sequence[Piece], memory: int, *, refined: bool = False) -> int:
    """How many threads fit into the memory, one at least."""
    if refined:
        sizes = (
            p.chunk.rows * p.tensor.shape[0] * REFINED_BYTES + p.tensor.shape[0] ** 2 * METRIC_BYTES
            for p in pieces
        )
    else:
        sizes = (p.chunk.rows * p.tensor.shape[0] * WEIGHT_BYTES for p in pieces)
    return max((memory - FIXED_BYTES) // max(sizes, default=1), 1)
