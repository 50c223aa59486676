"""Compare the engine with llama-quantize on one machine: ``python -m tests.benchmarks.engine --help``.

Every ratio is of two runs that follow each other, with the same types, threads and files. The base
is in the page cache for both. The bound is the time of the distinct work: each tensor once for each
type, at the speed that a core has while the others work too.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from quant.calibration import imatrix
from quant.core import child
from quant.llama import ggml
from quant.llama.ggml import Kernel, Rows
from quant.llama.gguf import read_header
from quant.llama.toolchain import find_toolchain
from quant.llama.types import TYPES
from quant.plan.load import load_variant
from quant.plan.plan import Plan, make_plan
from quant.quantize.engine.job import EngineJob
from quant.quantize.kernels import Kernels
from quant.quantize.variants import QuantizeTarget
from tests.benchmarks.measured import Measured, machine, measured
from tests.benchmarks.synthetic import write_synthetic
from tests.llama_quantize import type_file

LADDER = (
    "UD-TQ1_0",
    "UD-IQ1_S",
    "UD-IQ1_M",
    "UD-IQ2_XXS",
    "UD-Q2_K_XL",
    "UD-IQ3_XXS",
    "UD-Q3_K_XL",
    "UD-Q4_K_XL",
    "UD-Q5_K_XL",
    "UD-Q8_K_XL",
    "IQ4_NL",
    "Q4_1",
)
ALONE = ("UD-IQ2_XXS", "UD-Q4_K_XL", "Q4_1")
FASTEST = "the fastest"
SERVING = ("ggml", FASTEST)
"""ggml's own kernels measure the engine alone; the fastest ones make a release."""
ROWS, ROW = 512, 1024
TRIES = 5
CORES = len(os.sched_getaffinity(0))


class Bench:
    """A synthetic model, and the two programs that quantize it."""

    def __init__(self, folder: Path, gigabytes: float) -> None:
        self.folder = folder / f"{gigabytes:g}GB"
        self.base, self.matrix = write_synthetic(self.folder, gigabytes)
        self.header = read_header(self.base)
        self.covered = imatrix.read_imatrix(self.matrix).covered
        self.weights = self.header.elements

    def plan(self, name: str) -> Plan:
        """Return the plan of a variant."""
        return make_plan(load_variant(name), self.header.tensors, self.covered)

    def ours(self, names: Sequence[str], kernels: str) -> Measured:
        """Measure one pass of the engine for these variants."""
        out = self._empty("ours")
        self._cached()
        return measured(self._command(names, out), cwd=out, env=serving(kernels))

    def theirs(self, name: str) -> Measured:
        """Measure llama-quantize for one variant."""
        out, chosen = self._empty("theirs"), self.plan(name)
        (out / "types.txt").write_text(
            type_file({t.tensor.name: t.type.name for t in chosen.tensors if t.rule is not None})
        )
        self._cached()
        given: list[str | Path] = ["--imatrix", self.matrix, "--tensor-type-file", "types.txt"]
        last = [chosen.variant.file_type, str(CORES)]
        command = [find_toolchain().path("llama-quantize"), *given, self.base, "out.gguf", *last]
        return measured(command, cwd=out)

    def resumed(self, names: Sequence[str], share: float) -> tuple[Measured, float, float]:
        """Kill a run at a fraction of its work, and continue it.

        Return the second run, the seconds of both together, and the fraction at which it was killed.
        """
        out = self._empty("ours")
        self._cached()
        began = time.monotonic()
        process = subprocess.Popen(self._command(names, out), cwd=out)
        while _read_progress(out) < share:
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        first, cut = time.monotonic() - began, _read_progress(out)
        rest = measured(self._command(names, out), cwd=out)
        return rest, first + rest.wall_s, cut

    def bound_s(self, names: Sequence[str], cost: dict[str, float]) -> tuple[float, float]:
        """Return the seconds of one core for the distinct work of these variants, and for all of it."""
        plans = [self.plan(n) for n in names]
        work = [
            [(p.tensors[i].tensor, p.tensors[i].type.name) for p in plans]
            for i in range(len(plans[0].tensors))
        ]
        distinct = sum(
            cost.get(kind, 0.0) * t.elements
            for row in work
            for t, kind in set(row)
            if t.type.name != kind
        )
        every = sum(
            cost.get(kind, 0.0) * t.elements
            for row in work
            for t, kind in row
            if t.type.name != kind
        )
        return distinct, every

    def types(self, names: Sequence[str]) -> list[str]:
        """Return all types that these variants use."""
        return sorted({t.type.name for n in names for t in self.plan(n).tensors} - {"F32", "BF16"})

    def _command(self, names: Sequence[str], out: Path) -> list[str | Path]:
        job = EngineJob(
            library=ggml.find_library(find_toolchain().bin),
            base=self.base,
            identity="benchmark",
            imatrix=self.matrix,
            imatrix_name="imatrix.gguf",
            variants=tuple(QuantizeTarget(self.plan(n), out / f"{n}.gguf").request for n in names),
        )
        return child.write_job("quant.quantize.engine.worker", asdict(job), out)

    def _empty(self, name: str) -> Path:
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return out

    def _cached(self) -> None:
        with self.base.open("rb") as f:
            while f.read(2**24):
                pass


def _read_progress(out: Path) -> float:
    try:
        return float((out / child.PROGRESS).read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


def serving(kernels: str) -> dict[str, str]:
    """Return the environment variables that choose these kernels."""
    return {"QUANT_KERNELS": kernels} if kernels != FASTEST else {}


def costs(types: Sequence[str], kernels: str) -> dict[str, float]:
    """Measure the seconds of one core per weight for each type, while all cores work: best of TRIES."""
    library = ggml.load_ggml(ggml.find_library(find_toolchain().bin))
    ours = Kernels(library)
    rng = np.random.default_rng(3)
    rows = [rng.standard_normal((ROWS, ROW), np.float32) * np.float32(0.02) for _ in range(CORES)]
    weights = rng.gamma(1.0, 5.0, ROW).astype(np.float32)
    costs_by_type = {}
    for name in types:
        if kernels == FASTEST:
            kernel = ours.kernel(TYPES[name])
        else:
            library.initialize(TYPES[name])
            kernel = library.kernel(TYPES[name])

        def measure(own: Rows, kernel: Kernel = kernel) -> float:
            began = time.thread_time()
            kernel(own, weights)
            return time.thread_time() - began

        with ThreadPoolExecutor(CORES) as threads:
            tries = [sum(threads.map(measure, rows)) / CORES for _ in range(TRIES)]
        costs_by_type[name] = min(tries) / rows[0].size
    return costs_by_type


def main() -> None:
    """Run the chosen benchmarks, and print tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", default=["ladder", "alone", "resume", "growth"], help="all of them"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where files are written; all benchmarks need about 30 GB",
    )
    parser.add_argument("--gigabytes", type=float, default=1.1)
    asked = parser.parse_args()
    print(f"{machine()}; llama.cpp {find_toolchain().version}\n")
    bench = Bench(asked.folder, asked.gigabytes)
    print(
        f"source: {bench.base.stat().st_size / 1e9:.2f} GB, {bench.weights / 1e6:.0f} million weights\n"
    )
    for what in asked.what:
        {"ladder": ladder, "alone": alone, "resume": resume, "growth": growth}[what](bench)


def ladder(bench: Bench) -> None:
    """Compare one pass for twelve variants with twelve runs of llama-quantize."""
    theirs = {name: bench.theirs(name) for name in LADDER}
    alone_s = sum(m.wall_s for m in theirs.values())
    print("| | wall s | CPU s | cores busy | peak memory |\n|---|---:|---:|---:|---:|")
    for name, m in theirs.items():
        _row(f"llama-quantize {name}", m)
    passes, bounds = {}, {}
    for kernels in (
        SERVING
    ):  # the machine's speed drifts: what a type costs is measured before a pass, and after it
        before = costs(bench.types(LADDER), kernels)
        passes[kernels] = bench.ours(LADDER, kernels)
        after = costs(bench.types(LADDER), kernels)
        bounds[kernels] = bench.bound_s(
            LADDER, {name: (before[name] + after[name]) / 2 for name in before}
        )
        _row(f"one pass, kernels: {kernels}", passes[kernels])
    print(
        "\n| one pass | of twelve runs | distinct / all work | bound s | taken s | of the bound |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for kernels, m in passes.items():
        distinct, every = bounds[kernels]
        bound = distinct / CORES
        shares = f"{m.wall_s / alone_s:.3f} | {distinct / every:.3f}"
        print(f"| {kernels} | {shares} | {bound:.1f} | {m.wall_s:.1f} | {m.wall_s / bound:.3f} |")
    print()


def alone(bench: Bench) -> None:
    """Compare three variants, each alone."""
    print(
        "| one variant | kernels | ours s | theirs s | ratio | cores busy | theirs | peak memory |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in ALONE:
        theirs = bench.theirs(name)
        for kernels in SERVING:
            m = bench.ours([name], kernels)
            ratio, peak = f"{m.wall_s / theirs.wall_s:.3f}", f"{m.peak_bytes / 1e6:.0f} MB"
            seconds = f"{m.wall_s:.1f} | {theirs.wall_s:.1f}"
            busy = f"{m.busy(CORES):.1%} | {theirs.busy(CORES):.1%}"
            print(f"| {name} | {kernels} | {seconds} | {ratio} | {busy} | {peak} |", flush=True)
    print()


def resume(bench: Bench) -> None:
    """Measure the cost of a kill: both parts together, compared with an uninterrupted run."""
    names = LADDER[3:]
    print("| killed at | in one piece s | both parts s | cost |\n|---:|---:|---:|---:|")
    for share in (0.3, random.Random(4).uniform(0.45, 0.55), 0.7):
        whole = bench.ours(names, FASTEST)
        _, both, cut = bench.resumed(names, share)
        print(f"| {cut:.0%} | {whole.wall_s:.1f} | {both:.1f} | {both / whole.wall_s - 1:+.1%} |")
    print()


def growth(bench: Bench) -> None:
    """Measure speed, core use and memory for bases of several sizes."""
    print(
        "| source GB | variant | million weights/s | cores busy | peak memory |\n|---:|---|---:|---:|---:|"
    )
    for gigabytes in (1, 2, 4, 8):
        larger = Bench(bench.folder.parent, gigabytes)
        m = larger.ours(["UD-Q4_K_XL"], FASTEST)
        size = larger.base.stat().st_size / 1e9
        speed, busy = f"{larger.weights / m.wall_s / 1e6:.1f}", f"{m.busy(CORES):.1%}"
        print(f"| {size:.2f} | UD-Q4_K_XL | {speed} | {busy} | {m.peak_bytes / 1e6:.0f} MB |")
        shutil.rmtree(larger.folder)
    print()


def _row(name: str, m: Measured) -> None:
    print(
        f"| {name} | {m.wall_s:.1f} | {m.cpu_s:.1f} | {m.busy(CORES):.1%} | {m.peak_bytes / 1e6:.0f} MB |"
    )


if __name__ == "__main__":
    main()
