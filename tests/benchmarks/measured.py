"""Run a program and measure it; describe the machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """What a run of a program took."""

    wall_s: float
    cpu_s: float
    """Of all threads, in user code and in the kernel."""
    peak_bytes: int
    """The peak resident memory; of mapped files the pages that were touched count."""

    def busy(self, cores: int) -> float:
        """Return the fraction of the cores that it kept busy."""
        return self.cpu_s / self.wall_s / cores


LAUNCHER = """
import json, os, resource, subprocess, sys, time
began = time.monotonic()
code = subprocess.run(sys.argv[1:], stdout=2).returncode
wall, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
"""Starts a program from a small process: until exec, a child counts its parent's memory as its own."""


def measured(
    command: Sequence[str | Path], *, cwd: Path, env: dict[str, str] | None = None
) -> Measured:
    """Run a program and measure it. Raise AssertionError with its output if it fails."""
    launched = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, command)],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    )
    code, wall, cpu, peak = json.loads(launched.stdout.splitlines()[-1])
    assert code == 0, launched.stderr[-2000:]
    return Measured(wall, cpu, peak)


def machine() -> str:
    """Return the processor and its cores as a line."""
    info = Path("/proc/cpuinfo").read_text()
    model_name = re.search(r"model name\s*: (.*)", info)
    family = re.search(r"cpu family\s*: (.*)\nmodel\s*: (.*)", info)
    name = (
        f"{model_name[1]}, family {family[1]}, model {family[2]}"
        if model_name and family
        else "unknown processor"
    )
    sets = [s for s in ("avx2", "avx512f") if re.search(rf"\b{s}\b", info)]
    return f"{name} ({', '.join(sets)}), {len(os.sched_getaffinity(0))} cores"
