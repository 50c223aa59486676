"""Measure error table and sensitivities of a model; several machines can share the probes.

``quant probe`` calls ``measure_sensitivities``; ``quant.evaluate.allocation`` uses the steps.
"""

import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.core.errors import InputError
from quant.core.store import Store
from quant.evaluate.compare import EvaluationSettings
from quant.evaluate.error_measurement import measure_errors
from quant.evaluate.probe import (
    ProbeSettings,
    describe_probes,
    forecast_probes,
    list_probes,
    measure_probes,
    select_part,
)
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain, find_toolchain
from quant.plan.error_table import (
    CANDIDATES,
    ErrorTable,
    check_hessian_digest,
    read_error_table,
    write_error_table,
)
from quant.plan.fit import fit_sensitivities
from quant.plan.sensitivity import Probe, ProbeResult, Sensitivities, read_sensitivities

log = logging.getLogger(__name__)
ERRORS_NAME = "errors.json"
"""The error table in a work folder."""


@dataclass(frozen=True, kw_only=True)
class SensitivityRequest:
    """A model to probe, and how."""

    base: Path
    """The BF16 file; the first shard of a split one."""
    text: Path
    """From the calibration side; never a text by which files are judged."""
    imatrix: Path | None = None
    """Its importance matrix."""
    errors: Path | None = None
    """The error table; measured and written if the file does not exist. None keeps it in
    ``work``."""
    hessians: Path | None = None
    """Hessians for error compensation (GPTQ); None quantizes as llama-quantize does."""
    chunks: int | None = None
    """Maximum number of chunks of the text; None reads all of it."""
    threads: int = 2
    cheap: bool = False
    """About forty probes, by class and third of the depth, for models of hundreds of gigabytes."""
    part: str | None = None
    """I/N measures every Nth probe from the Ith on: what one of N machines does."""
    merge: tuple[Path, ...] = ()
    """Sensitivity files of other machines, whose probes are not measured again."""
    work: Path | None = None
    """Where probes are kept, to continue from; None keeps nothing."""
    llama_cpp: Path | None = None
    """Folder of llama.cpp's tools; None searches."""


def measure_sensitivities(
    request: SensitivityRequest, *, forecast_only: bool = False
) -> Sensitivities | None:
    """Measure the probes of a model and return the sensitivities that follow from them.

    Args:
        request: The model, and how it is probed.
        forecast_only: Log what measuring would take, and return None.

    Returns:
        The sensitivities. With ``part`` they hold the probes of this machine alone and no scales.

    Raises:
        InputError: The text is too short, or the error table, the Hessians or the merged probes
            are of another model or were measured in another way.
    """
    tools = find_toolchain(request.llama_cpp)
    with tempfile.TemporaryDirectory(prefix="quant-probe-") as temporary:
        store = Store((request.work or Path(temporary)).resolve())
        base = ModelFile.open(request.base.resolve())
        table = prepare_error_table(
            request.errors or store.root / ERRORS_NAME,
            base=base,
            imatrix=request.imatrix,
            hessians=request.hessians,
            tools=tools,
        )
        # Absolute paths: quantizer and scorer run in folders of their own.
        settings = ProbeSettings(
            base=base,
            imatrix=request.imatrix and request.imatrix.resolve(),
            text=request.text.resolve(),
            tools=tools,
            store=store,
            evaluation=EvaluationSettings(chunks=request.chunks, threads=request.threads),
            hessians=request.hessians and request.hessians.resolve(),
        )
        probes = list_probes(base.tensors, table, cheap=request.cheap)
        if request.part:
            probes = select_part(probes, request.part)
        merged = read_other_probes(request.merge, base.digest, describe_probes(settings))
        # A probe is identified by its types. Its name is for people, and may differ by version.
        known = {frozenset(r.probe.types.items()) for r in merged}
        todo = [p for p in probes if frozenset(p.types.items()) not in known]
        log.info(forecast_probes(todo, settings))
        if forecast_only:
            return None
        results = (*run_probes(todo, settings), *merged)
        source = f"{len(results)} probes on {describe_probes(settings)}"
        if request.part:
            # Scales are fitted to all probes at once, by the run that merges the parts.
            return Sensitivities(base=table.base, source=source, scales={}, probes=results)
        return fit_sensitivities(results, table, source)


def prepare_error_table(
    path: Path,
    *,
    base: ModelFile,
    imatrix: Path | None,
    hessians: Path | None,
    tools: Toolchain,
    types: Iterable[str] = CANDIDATES,
) -> ErrorTable:
    """Return the error table in a file; measure and write it first if the file does not exist.

    Args:
        path: The file.
        base: The BF16 file.
        imatrix: Its importance matrix.
        hessians: Hessians for error compensation (GPTQ).
        tools: The llama.cpp whose ggml quantizes.
        types: The types to measure.

    Raises:
        InputError: The file is of another model, or was measured with other Hessians.
    """
    if not path.exists():
        types = tuple(types)
        log.info("%s: measuring the quantization error of %d types", path, len(types))
        table = measure_errors(base.path, imatrix, tools, types=types, hessians=hessians)
        write_error_table(path, table)
    # Read even if it was just written: a continued run then has the same digits.
    table = read_error_table(path, base.digest)
    check_hessian_digest(path, table.hessians, hessians)
    return table


def run_probes(probes: Sequence[Probe], settings: ProbeSettings) -> tuple[ProbeResult, ...]:
    """Return the results of probes, one run at a time in a work folder, and log the progress."""
    # The files of a batch have fixed names: a second run would write over them.
    with settings.store.lock():
        return measure_probes(
            probes, settings, lambda done, total: log.info("probes: %d of %d", done, total)
        )


def read_other_probes(
    paths: Iterable[Path], base: str, description: str
) -> tuple[ProbeResult, ...]:
    """Return the probes that other machines measured.

    Args:
        paths: Their sensitivity files.
        base: sha256 of the BF16 file.
        description: What the probes of this machine are measured on.

    Raises:
        InputError: A file is of another model, or was measured on another text or in another way.
    """
    results: list[ProbeResult] = []
    for path in paths:
        other = read_sensitivities(path, base)
        # A source is "12 probes on DESCRIPTION"; machines have different numbers of probes.
        if not other.source.endswith(f" on {description}"):
            raise InputError(
                f"{path}: measured in another way: expected probes on {description},"
                f" found {other.source}"
            )
        results += other.probes
    return tuple(results)
