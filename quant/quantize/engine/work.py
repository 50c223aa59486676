"""The threads of a run: each reads a chunk once, and writes it in every type to every file.

There is one thread more than cores, so that one computes while another waits for the disk. A thread
holds one chunk and nothing else, which bounds the memory. What was measured and rejected (a
semaphore, two or three threads more, other flush times) is in tests/benchmarks/README.md.
"""

import contextvars
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING

from quant.core import files, progress
from quant.core.errors import CheckError, InputError, raise_problems
from quant.core.format import to_pretty_json
from quant.llama import ggml
from quant.llama.ggml import Bytes, Kernel, Library, Rows
from quant.llama.types import FLOATS, TYPES, GGMLType
from quant.quantize.engine import status
from quant.quantize.engine.chunks import (
    WorkItem,
    order_work,
    select_costs,
    split_into_chunks,
)
from quant.quantize.engine.job import EngineJob, find_job_problems, find_space_problems
from quant.quantize.engine.journal import ErrorSums
from quant.quantize.engine.layout import HEAD, FileLayout, make_imatrix_metadata, make_layout
from quant.quantize.engine.output import TensorResult, VariantOutput
from quant.quantize.engine.reuse import ReusableTensors
from quant.quantize.engine.sample import RowSample
from quant.quantize.engine.weights import ColumnImportance, WeightSource, all_finite
from quant.quantize.kernels import Kernels

if TYPE_CHECKING:
    from quant.quantize.gptq.compensator import ErrorCompensator

KERNELS = "kernels.json"
"""File beside the job: which kernels quantized each type, and which tensors met a fault of ggml."""
EXTRA_THREADS = 1
"""Threads beside one for each core."""
PREFETCH_ITEMS = 16
"""How many items before its turn a chunk is asked of the disk."""
# 0.25 and 5 seconds were measured too: no difference in speed (tests/benchmarks/README.md).
FLUSH_SECONDS = 1.0
FIXED_BYTES = 96 * 2**20
"""Interpreter, numpy and the kernels' tables: twice what all types together took."""
BYTES_PER_WEIGHT = 12
"""Memory of a chunk: its rows as stored, as floats, and quantized, with numpy's temporary arrays.

Seven were measured.
"""
GPTQ_BYTES_PER_WEIGHT, BYTES_PER_HESSIAN_ENTRY = 64, 40
"""The same with error compensation, and for each entry of the Hessian."""


def quantize_job(job: EngineJob, folder: Path) -> None:
    """Write all files of a job, in this process.

    Args:
        job: What to write.
        folder: Holds the status file and the report of the kernels.

    Raises:
        InputError: The base, the imatrix, a type or the disk does not allow it.
        CheckError: ggml finds rows invalid, or a header read back is not the planned one.

    After an error no unfinished file has its final name.
    """
    source = WeightSource.open(job.base)
    imatrix = ColumnImportance.open(job.imatrix) if job.imatrix else None
    raise_problems(find_job_problems(job, source, imatrix))
    layouts = dict(zip((v.path for v in job.variants), _layouts(job, source, imatrix), strict=True))
    for path in layouts:
        path.parent.mkdir(parents=True, exist_ok=True)
    raise_problems(find_space_problems(layouts))
    run = EngineRun(
        source=source,
        imatrix=imatrix,
        outputs=[VariantOutput(layout, path, job.identity) for path, layout in layouts.items()],
        library=ggml.load_ggml(job.library),
        reusable=ReusableTensors(job.reusable),
        folder=folder,
        compensator=_open_compensator(job.hessians) if job.hessians else None,
    )
    run.run(job.settings.threads, job.settings.memory)
    files.write_text(folder / KERNELS, to_pretty_json(run.kernels.report()))
    source.file.check_unchanged()
    if imatrix:
        imatrix.file.check_unchanged()
    for output in run.outputs:
        output.finish(run.make_records(output), {"identity": job.identity})
        output.close()


def _open_compensator(hessians: Path) -> "ErrorCompensator":
    # Imported here: without error compensation a run starts without safetensors and gguf-py.
    from quant.quantize.gptq.compensator import ErrorCompensator

    return ErrorCompensator.open(hessians)


def _layouts(
    job: EngineJob, source: WeightSource, imatrix: ColumnImportance | None
) -> Iterator[FileLayout]:
    head = source.file.read(0, source.header.head_bytes, "head").tobytes()
    assert len(head) >= HEAD.size
    imatrix_metadata = (
        make_imatrix_metadata(imatrix.header.metadata, len(imatrix.entries), job.imatrix_name)
        if imatrix
        else {}
    )
    for v in job.variants:
        yield make_layout(
            source.header, head, v.types, v.file_type, imatrix_metadata, max_bytes=v.max_bytes
        )


@dataclass
class EngineRun:
    """What the threads of a run share."""

    source: WeightSource
    imatrix: ColumnImportance | None
    outputs: Sequence[VariantOutput]
    library: Library
    reusable: ReusableTensors
    folder: Path
    """Holds the status file."""
    compensator: "ErrorCompensator | None" = None
    """Refines rows with GPTQ; None writes ggml's bytes."""
    digests: dict[tuple[int, str], str] = field(default_factory=dict)
    """The sha256 of finished tensors, by tensor and type."""
    failure: BaseException | None = None
    """The first error of a thread."""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.status = status.WorkStatus(self.folder / status.IN_WORK)
        # One index serves all variants: their tensors are the same, in the same order.
        self.tensors = self.outputs[0].layout.tensors
        self.index = {placement.name: i for i, placement in enumerate(self.tensors)}
        self.kernels = Kernels(self.library)
        self.kernel_of: dict[str, Kernel] = {}

    def run(self, jobs: int, memory: int) -> None:
        """Write everything that is missing in the files.

        Args:
            jobs: Cores to keep busy.
            memory: Bytes that the run may take.

        Raises:
            BaseException: Whatever the first thread that failed raised.
        """
        self._copy_reusable(jobs)
        items = self._choose_kernels(self.list_missing_work())
        self.left = Counter(self.index[item.tensor.name] for item in items)
        self.queue = deque(items)
        self.total_cost, self.done_cost = sum(item.cost for item in items), 0.0
        self.to_hash = deque(
            pair for i in range(len(self.tensors)) if not self.left[i] for pair in self._by_type(i)
        )
        fitting = count_threads(items, memory, compensated=self.compensator is not None)
        count = min(jobs + EXTRA_THREADS, fitting)
        threads = [threading.Thread(target=self._run_thread, args=(i,)) for i in range(count)]
        # A thread starts with an empty context; the listener to the progress is in this one.
        context = contextvars.copy_context()
        flusher = threading.Thread(target=context.run, args=(self._run_flusher,))
        for thread in (*threads, flusher):
            thread.start()
        for thread in threads:
            thread.join()
        self.stop.set()
        flusher.join()
        if self.failure:
            raise self.failure

    def _copy_reusable(self, jobs: int) -> None:
        # Threads are enough: hashing and copying release Python's lock.
        with ThreadPoolExecutor(jobs) as pool:
            copies = pool.map(
                lambda i: self.reusable.copy_tensor(i, self.outputs), range(len(self.tensors))
            )
            # list() raises what a thread raised.
            list(copies)

    def list_missing_work(self) -> list[WorkItem]:
        """Return an item for every chunk that some file lacks, in file order."""
        items = []
        for i, placement in enumerate(self.tensors):
            for chunk in split_into_chunks(placement.source):
                missing = {
                    o.layout.tensors[i].type.name
                    for o in self.outputs
                    if (i, chunk.index) not in o.done
                }
                if missing:
                    # Sorted, because sets of strings are in another order in each process.
                    types = tuple(TYPES[name] for name in sorted(missing))
                    items.append(WorkItem(placement.source, chunk, types))
        return items

    def _choose_kernels(self, items: Sequence[WorkItem]) -> list[WorkItem]:
        """Choose a kernel for every type, and order the items by what they cost with these."""
        for ggml_type in {t for item in items for t in item.types if t != item.tensor.type}:
            self.kernel_of[ggml_type.name] = self.kernels.kernel(ggml_type)
        by_ggml = {n for n in self.kernel_of if self.kernels.choice(TYPES[n]).source == "ggml"}
        costs = select_costs(by_ggml)
        return order_work([replace(item, costs=costs) for item in items])

    def _run_thread(self, number: int) -> None:
        """Do items until none is left, or another thread failed."""
        try:
            while not self.stop.is_set():
                with self.lock:
                    # Hash first: the tensor's last chunks are still in the page cache.
                    complete = self.to_hash.popleft() if self.to_hash else None
                    item = self.queue.popleft() if complete is None and self.queue else None
                    ahead = len(self.queue) > PREFETCH_ITEMS
                    later = self.queue[PREFETCH_ITEMS] if item and ahead else None
                if later:
                    self.source.prefetch(later.tensor, later.chunk)
                if complete:
                    self._hash_tensor(*complete)
                elif item:
                    self._do_item(item, number)
                else:
                    # A tensor that another thread completes after this is hashed by that thread.
                    return
        except BaseException as e:  # whatever it is, the main thread raises it again
            with self.lock:
                self.failure = self.failure or e
            self.stop.set()

    def _do_item(self, item: WorkItem, thread: int) -> None:
        """Read the rows of a chunk, and write them wherever they are missing."""
        tensor, chunk = item.tensor, item.chunk
        index = self.index[tensor.name]
        raw = self.source.read_rows(tensor, chunk)
        rows, columns, sample, hessian = None, None, None, None
        if tensor.type.name in FLOATS:
            rows = self.library.to_float(tensor.type, raw, tensor.shape[0])
            if not all_finite(rows):
                raise InputError(self.source.describe_non_finite(tensor, self.library))
            columns = self.imatrix.columns(tensor, chunk.expert) if self.imatrix else None
            if self.compensator:
                hessian = self.compensator.find_hessian(tensor, chunk.expert)
            sample = RowSample.take(rows, columns, hessian)
        for ggml_type in item.types:
            if self.stop.is_set():
                return
            if ggml_type == tensor.type:
                data, sums = raw, ErrorSums(0.0, 0.0)
            else:
                assert rows is not None and sample is not None
                shown = self.status.show(thread, f"{tensor.name} as {ggml_type.name}")
                with shown, self.kernels.attribute_to(tensor.name):
                    data = self._quantize(item, ggml_type, rows, columns)
                    if self.compensator and hessian:
                        data = self.compensator.refine(ggml_type, rows, data, hessian)
                sums = sample.measure_error(self.library, ggml_type, data)
            self._check_rows(item, ggml_type, data)
            # Two variants with the same type for a tensor share the kernel's work, not the writing.
            for output in self.outputs:
                if (
                    output.layout.tensors[index].type == ggml_type
                    and (index, chunk.index) not in output.done
                ):
                    output.write_chunk(index, chunk, data, sums)
        with self.lock:
            self.done_cost += item.cost
            self.left[index] -= 1
            if not self.left[index]:
                self.to_hash.extend(self._by_type(index))

    def _quantize(
        self, item: WorkItem, ggml_type: GGMLType, rows: Rows, columns: Rows | None
    ) -> Bytes:
        """Return the stored rows. Raise InputError for rows on which ggml would abort."""
        try:
            # The kernels refuse such rows; ggml's own function would end the process.
            return self.kernel_of[ggml_type.name](rows, columns)
        except InputError as e:
            where = self._describe_rows(item)
            raise InputError(*(f"{where}: {problem}" for problem in e.problems)) from e

    def _check_rows(self, item: WorkItem, ggml_type: GGMLType, data: Bytes) -> None:
        """Raise CheckError if ggml finds the stored rows invalid (ggml_validate_row_data)."""
        if not self.library.is_valid(ggml_type, data):
            raise CheckError(f"{self._describe_rows(item)} are not valid as {ggml_type.name}")

    def _describe_rows(self, item: WorkItem) -> str:
        first = item.chunk.first_row
        rows = f"rows {first} to {first + item.chunk.rows - 1}"
        return f"{self.source.file.path}: tensor {item.tensor.name}: {rows}"

    def _by_type(self, tensor: int) -> Iterator[tuple[int, VariantOutput]]:
        """Yield the tensor with one file for each type that the files have it in."""
        yield from {
            o.layout.tensors[tensor].type.name: (tensor, o) for o in reversed(self.outputs)
        }.values()

    def _hash_tensor(self, tensor: int, output: VariantOutput) -> None:
        """Hash a complete tensor from its file, so that what was written is what is recorded."""
        type_name = output.layout.tensors[tensor].type.name
        self.digests[tensor, type_name] = output.hash_tensor(tensor)

    def _run_flusher(self) -> None:
        """Flush the files and report the progress every second."""
        try:
            while not self.stop.wait(FLUSH_SECONDS):
                progress.report_progress(self.done_cost / max(self.total_cost, 1))
                for output in self.outputs:
                    output.sync()
        except OSError as e:
            with self.lock:
                self.failure = self.failure or e
            self.stop.set()

    def make_records(self, output: VariantOutput) -> Mapping[str, TensorResult]:
        """Return the record of every tensor of a complete variant."""
        records = {}
        for i, placement in enumerate(output.layout.tensors):
            sums = [output.done[i, c.index] for c in split_into_chunks(placement.source)]
            signal = fsum(s.signal for s in sums)
            error = fsum(s.error for s in sums) / signal if signal else 0.0
            records[placement.name] = TensorResult(
                type=placement.type.name,
                sha256=self.digests[i, placement.type.name],
                # Six digits: the last ones depend on the order in which numpy adds here.
                error=float(f"{error:.6g}"),
            )
        return records


def count_threads(items: Sequence[WorkItem], memory: int, *, compensated: bool = False) -> int:
    """Return how many threads fit into the memory, at least one.

    Args:
        items: The work; its largest item counts.
        memory: Bytes.
        compensated: Whether rows are refined with GPTQ, which needs the Hessian in memory.
    """
    if compensated:
        sizes = [
            item.weights * GPTQ_BYTES_PER_WEIGHT
            + item.tensor.shape[0] ** 2 * BYTES_PER_HESSIAN_ENTRY
            for item in items
        ]
    else:
        sizes = [item.weights * BYTES_PER_WEIGHT for item in items]
    return max((memory - FIXED_BYTES) // max(sizes, default=1), 1)
