"""Measure how sensitive a model is to coarse tensors, a few at a time.

A probe is a file that is the base but for the probed tensors, which have a coarse type. Its KLD is
measured on text from the calibration side, never on the text by which results are judged. Small
models are probed tensor by tensor at several types; large ones by tensor class and depth.
:mod:`quant.plan.sensitivity` makes sensitivities of the results.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quant.calibration.hessian_file import Hessians
from quant.core import files
from quant.core.errors import InputError
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.evaluate.compare import EvaluationSettings, measure_files
from quant.evaluate.scores import TokenScores
from quant.llama.gguf import Header, TensorSpec
from quant.llama.model import bindings_version
from quant.llama.model_file import ModelFile
from quant.llama.tensors import tensor_class
from quant.llama.toolchain import Toolchain
from quant.llama.types import TYPES
from quant.plan.error_table import ErrorTable, TensorError
from quant.plan.plan import Plan, compute_depths, is_quantizable, make_plan
from quant.plan.recipe import Rule, Variant
from quant.plan.sensitivity import Probe, ProbeResult
from quant.quantize.engine.job import EngineSettings
from quant.quantize.gptq import REVISION
from quant.quantize.variants import QuantizeTarget, WriteRequest, write_variants

PROBE_TYPES = ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q4_K")
"""From the coarsest type in use to one that costs almost nothing: how KLD grows with error."""
WITHOUT_IMATRIX = {
    "IQ1_S": "Q2_K",
    "IQ1_M": "Q2_K",
    "IQ2_XXS": "Q2_K",
    "IQ2_XS": "Q2_K",
    "IQ2_S": "Q2_K",
    "IQ3_XXS": "IQ3_S",
}
"""Stand-ins for types that need an imatrix, on tensors of which it has no data."""
BANDS = 4
"""Parts of the model's depth in which a class is probed."""
CHEAP_BANDS, CHEAP_TYPE = 3, "IQ2_XXS"
SINGLE_BELOW = 200
"""Models with fewer matrices are probed tensor by tensor."""
MIN_CHUNKS = 8
"""With fewer, the standard error of a probe is unknown itself."""
COMPENSATION_MARK = "fed back by"
"""In the description of probes that were quantized with GPTQ; the Hessians' digest follows.

Sensitivity files that were published have it: it stays as it is.
"""
BATCH = 12
"""Maximum number of probe files on disk."""
BYTES_PER_TOKEN = 4
"""Of text, roughly, for a forecast."""


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are made and measured."""

    base: ModelFile
    imatrix: Path | None
    text: Path
    """From the calibration side; never a text by which files are judged."""
    tools: Toolchain
    store: Store
    evaluation: EvaluationSettings
    rest_type: str = "BF16"
    """Type of every tensor that is not probed. Q8_0 if BF16 is too large to be read that often."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    hessians: Path | None = None
    """Hessians for GPTQ; None quantizes as llama-quantize does."""


def list_probes(
    tensors: Sequence[TensorSpec],
    errors: ErrorTable,
    types: Sequence[str] = PROBE_TYPES,
    *,
    cheap: bool = False,
) -> tuple[Probe, ...]:
    """Return the probes of a model, tensor by tensor if it has few, else by class and depth.

    Args:
        tensors: The base's tensors.
        errors: Those in this table are probed.
        types: The types to probe with, from coarse to fine.
        cheap: About forty probes, for models of hundreds of gigabytes: classes in few bands of
            depth at one type. Only the largest group is probed at all types, which is enough to fit
            how KLD grows with error.
    """
    probed = [t for t in tensors if t.name in errors.errors]
    if cheap:
        groups = _group(_without_mtp(probed), CHEAP_BANDS, singles=False)
        elements = {t.name: t.elements for t in probed}
        largest = max(groups, key=lambda name: sum(elements[n] for n in groups[name]))
    else:
        groups, largest = _group(probed, BANDS, singles=len(probed) < SINGLE_BELOW), ""
    probes: list[Probe] = []
    for level in types:
        for name, members in groups.items():
            # KLD is a power of error; its exponent is one for the model, so one group shows it.
            if cheap and level != CHEAP_TYPE and name != largest:
                continue
            by_tensor = {t: _choose_type(level, errors.errors[t]) for t in members}
            probe = Probe(f"{name} at {'/'.join(sorted(set(by_tensor.values())))}", by_tensor)
            # Without an imatrix, two levels can end in the same types.
            if probe not in probes:
                probes.append(probe)
    return tuple(probes)


def forecast_probes(probes: Sequence[Probe], settings: ProbeSettings) -> str:
    """Return a line about how many probes are still to be measured, and what each takes."""
    todo = [p for p in probes if not settings.store.find("probe", _make_key(p, settings))]
    header = settings.base.header
    sizes = [_plan("probe", p, header, settings.rest_type).bytes for p in todo]
    reading = settings.evaluation
    length = settings.text.stat().st_size // BYTES_PER_TOKEN // reading.context
    return (
        f"{len(todo)} of {len(probes)} probes are to be measured: each a file of about"
        f" {max(sizes, default=0):,} bytes, at most {BATCH} of them on the disk at a time, which"
        f" reads {reading.chunks or length} chunks of {reading.context} tokens"
    )


def measure_probes(
    probes: Sequence[Probe],
    settings: ProbeSettings,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ProbeResult, ...]:
    """Return what each probe costs. What is in the store is not measured again.

    Args:
        probes: What to measure.
        settings: How probes are made and measured.
        report: Called after each batch with how many are done, and of how many.

    Returns:
        For each probe its mean KLD and the standard error of it, both in nats.

    Raises:
        InputError: If the text has fewer than MIN_CHUNKS chunks, or the Hessians are of another
            model.
    """
    if settings.hessians:
        # Only for its error, before hours of probing: Hessians of another base would make no sense.
        Hessians.open(settings.hessians, settings.base.digest)
    keys = [_make_key(p, settings) for p in probes]
    todo = [i for i, key in enumerate(keys) if not settings.store.find("probe", key)]
    # One pass over the base's weights writes all files of a batch, so larger batches read less.
    # Each is stored when it is done: an interrupted run loses one batch.
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        for i, scores in zip(batch, _score([probes[i] for i in batch], settings), strict=True):
            # Chunks are the independent samples, tokens are not: the standard error of chunk means.
            means = scores.kld.mean(1, dtype=np.float64)
            facts = {
                "kld": float(means.mean()),
                "deviation": float(means.std(ddof=1) / math.sqrt(len(means))),
            }
            settings.store.begin("probe", keys[i])
            settings.store.commit("probe", keys[i], facts)
        report(min(start + BATCH, len(todo)), len(todo))
    results = [settings.store.find("probe", key) for key in keys]
    return tuple(
        ProbeResult(p, done.facts["kld"], done.facts["deviation"])
        for p, done in zip(probes, results, strict=True)
        if done
    )


def select_part(probes: Sequence[Probe], part: str) -> tuple[Probe, ...]:
    """Return the probes of one machine among several: ``2/3`` is every third from the second on.

    Raises:
        InputError: If ``part`` has another form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    first, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= count:
        raise InputError(
            f"part: expected a number and how many there are, as in 1/3, found {part!r}"
        )
    # Every Nth, not the Nth piece: all machines get probes of all classes, and end together.
    return tuple(probes[first - 1 :: count])


def describe_probes(settings: ProbeSettings) -> str:
    """Return what probes are measured on. Only probes with equal descriptions can be merged.

    Sensitivity files that were published have it: its form stays as it is.
    """
    digest, reading = files.hash_file(settings.text)[:12], settings.evaluation
    compensated = "".join(
        f", {COMPENSATION_MARK} {h[:12]}" for h in _identify_compensation(settings).values()
    )
    chunks = f"{reading.chunks or 'all'} chunks of {reading.context}"
    return (
        f"{settings.text.name} ({digest}, {chunks}), the rest in {settings.rest_type}{compensated}"
    )


@cache
def _identify_compensation(settings: ProbeSettings) -> Mapping[str, str]:
    """Return what identifies the Hessians and the GPTQ code; nothing without Hessians."""
    if not settings.hessians:
        return {}
    return {"moments": f"{files.hash_file(settings.hessians)} {REVISION}"}


def _make_key(probe: Probe, settings: ProbeSettings) -> dict[str, Any]:
    return {**_shared_key(settings), "types": dict(probe.types)}


@cache
def _shared_key(settings: ProbeSettings) -> Mapping[str, Any]:
    """Return what the store's keys of all probes have in common; names are as in finished work."""
    return {
        "base": settings.base.digest,
        "imatrix": files.hash_file(settings.imatrix) if settings.imatrix else None,
        "text": files.hash_file(settings.text),
        "blanket": settings.rest_type,
        **asdict(settings.evaluation),
        # Two builds of llama.cpp can take part: the user's quantizes the probes, ours reads them.
        "llama.cpp": str(settings.tools.version),
        "reader": bindings_version(),
        **_identify_compensation(settings),
    }


def _score(probes: Sequence[Probe], settings: ProbeSettings) -> list[TokenScores]:
    """Write the probes' files, score them, and delete them."""
    base, header = settings.base, settings.base.header
    folder = settings.store.work_folder("probe")
    # An interrupted run's files have these names and other types.
    files.remove(folder)
    targets = [
        QuantizeTarget(_plan(f"p{n}", p, header, settings.rest_type), folder / f"p{n}.gguf")
        for n, p in enumerate(probes)
    ]
    try:
        request = WriteRequest(
            base=base,
            targets=targets,
            identity=base.digest,
            tools=settings.tools,
            imatrix=ModelFile.open(settings.imatrix) if settings.imatrix else None,
            hessians=settings.hessians,
            settings=settings.engine,
        )
        write_variants(request, folder / "work")
        # What went into a file identifies it as well as its bytes, which need not be hashed.
        shared = [*_identify_compensation(settings).values()]
        identities = {
            t.path: to_canonical_json([base.digest, settings.rest_type, dict(p.types), *shared])
            for t, p in zip(targets, probes, strict=True)
        }
        evaluations = measure_files(
            base, identities, {"text": settings.text}, settings.store, settings.evaluation
        )
    finally:
        files.remove(folder)
    scores = [e.overall for e in evaluations]
    # Not known earlier: only the model that reads a text counts its tokens.
    if (count := len(scores[0].kld)) < MIN_CHUNKS:
        raise InputError(
            f"{settings.text}: expected at least {MIN_CHUNKS} chunks to probe with, found {count}:"
            " too few for a standard error"
        )
    return scores


def _plan(name: str, probe: Probe, header: Header, rest_type: str) -> Plan:
    types = {
        t.name: probe.types.get(t.name, rest_type) for t in header.tensors if is_quantizable(t)
    }
    rules = tuple(
        Rule(re.escape(tensor), kind, "One tensor of a probe.") for tensor, kind in types.items()
    )
    # The file type is a label that llama.cpp shows; the rules give every type.
    variant = Variant(name=name, summary="A probe.", file_type="Q8_0", rules=rules)
    # Every tensor counts as covered: a coarse type is the purpose here.
    return make_plan(variant, header.tensors, covered=frozenset(types))


def _without_mtp(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the tensors without those of MTP blocks, which take no part in reading.

    A class that is only there stays: there would be no sensitivity for it.
    """
    depths = compute_depths(tensors)
    trunk = [t for t in tensors if depths.get(t.name, 0) < 1]
    classes = {tensor_class(t.name) for t in trunk}
    return trunk + [t for t in tensors if tensor_class(t.name) not in classes]


def _group(tensors: Sequence[TensorSpec], bands: int, *, singles: bool) -> dict[str, list[str]]:
    """Return tensors by the name of their group: each alone, or by class and band of depth."""
    if singles:
        return {t.name: [t.name] for t in tensors}
    depths = compute_depths(tensors)
    groups: dict[str, list[str]] = {}
    for t in tensors:
        depth = depths.get(t.name)
        if depth is None:
            band = ""
        elif depth >= 1:
            band = " behind the trunk"
        else:
            band = f" band {int(depth * bands) + 1} of {bands}"
        groups.setdefault(f"{tensor_class(t.name)}{band}", []).append(t.name)
    return groups


def _choose_type(level: str, possible: Mapping[str, TensorError]) -> str:
    """Return the type to probe with: the level's, its stand-in, or the closest one in bits."""
    for name in (level, WITHOUT_IMATRIX.get(level, level)):
        if name in possible:
            return name
    bits = TYPES[level].bits_per_weight
    # Sorted, so that of two types that are equally close every run takes the same.
    return min(sorted(possible), key=lambda name: abs(TYPES[name].bits_per_weight - bits))
