"""Measure what coarse tensors do: build files in which only a few are coarse, and read a text with each.

A probe is a file like the base in all but the probed tensors. Its divergence from the base is measured on text that is
not the one that results are judged by. Small models are probed tensor by tensor, at several types; large ones by class
and depth.
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
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.errors import InputError
from quant.evaluate import compare
from quant.llama.gguf import Header, TensorSpec, read_header
from quant.llama.model import bindings_version
from quant.llama.tensors import tensor_class
from quant.llama.toolchain import Toolchain
from quant.llama.types import TYPES
from quant.plan.error_table import ErrorTable, TensorError
from quant.plan.plan import Plan, compute_depths, is_quantizable, make_plan
from quant.plan.recipe import Rule, Variant
from quant.plan.sensitivity import Probe, ProbeResult
from quant.quantize.engine.job import EngineSettings as Engine
from quant.quantize.gptq import REVISION
from quant.quantize.variants import QuantizeTarget, write_variants

LEVELS = ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q4_K")
"""Types of probes: from the coarsest that anyone would take to one that is nearly harmless."""
NEAREST = {
    "IQ1_S": "Q2_K",
    "IQ1_M": "Q2_K",
    "IQ2_XXS": "Q2_K",
    "IQ2_XS": "Q2_K",
    "IQ2_S": "Q2_K",
    "IQ3_XXS": "IQ3_S",
}
"""For tensors without imatrix data."""
BANDS = 4
CHEAP_BANDS, CHEAP_LEVEL = 3, "IQ2_XXS"
SINGLE_BELOW = 200
"""Models with fewer matrices are probed tensor by tensor."""
FEWEST_CHUNKS = 8
"""With fewer, the noise of a probe is not known."""
FED_BACK = "fed back by"
"""Said of probes whose rounding was, before the digest of the moments."""
AT_ONCE = 12
"""Probe files that lie on the disk at a time."""
BYTES_PER_TOKEN = 4
"""Of a text, about, for a forecast."""


@dataclass(frozen=True)
class ProbeSetup:
    """Everything that probes are made and measured with."""

    base: Path
    matrix: Path | None
    text: Path
    """Calibration-side: never what files are judged by."""
    tools: Toolchain
    store: Store
    reading: compare.EvaluationSettings
    blanket: str = "BF16"
    """Type of everything that is not probed; Q8_0 for models whose BF16 file is too large to be read so often."""
    engine: Engine = field(default_factory=Engine)
    moments: Path | None = None
    """With which rounding is fed back."""


def list_probes(
    tensors: Sequence[TensorSpec],
    errors: ErrorTable,
    levels: Sequence[str] = LEVELS,
    *,
    cheap: bool = False,
) -> tuple[Probe, ...]:
    """What there is to measure for these tensors: each alone where they are few, else class by class and band by band.

    Cheap, for models of hundreds of gigabytes: class by class and fewer bands at one type, about forty in all, and the
    heaviest group at the others, which tells the power.
    """
    wanted = [t for t in tensors if t.name in errors.errors]
    if cheap:
        groups = _groups(_in_trunk(wanted), CHEAP_BANDS, singles=False)
        weights = {t.name: t.elements for t in wanted}
        heaviest = max(groups, key=lambda name: sum(weights[n] for n in groups[name]))
    else:
        groups, heaviest = _groups(wanted, BANDS, singles=len(wanted) < SINGLE_BELOW), ""
    found = []
    for level in levels:
        for name, members in groups.items():
            if cheap and level != CHEAP_LEVEL and name != heaviest:
                continue
            types = {t: _nearest(level, errors.errors[t]) for t in members}
            probe = Probe(f"{name} at {'/'.join(sorted(set(types.values())))}", types)
            if probe not in found:
                found.append(probe)
    return tuple(found)


def forecast_probes(wanted: Sequence[Probe], setting: ProbeSetup) -> str:
    """What measuring costs, in words, before it begins."""
    header = read_header(setting.base)
    todo = [p for p in wanted if not setting.store.find("probe", _key(p, setting))]
    sizes = [_plan("probe", p, header, setting.blanket).bytes for p in todo]
    tokens = (
        setting.reading.chunks
        or setting.text.stat().st_size // BYTES_PER_TOKEN // setting.reading.context
    )
    return (
        f"{len(todo)} of {len(wanted)} probes are to be measured: each a file of about {max(sizes, default=0):,} bytes, at"
        f" most {AT_ONCE} of them on the disk at a time, which reads {tokens} chunks of {setting.reading.context} tokens"
    )


def measure_probes(
    wanted: Sequence[Probe],
    setting: ProbeSetup,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[ProbeResult, ...]:
    """What each probe does; what was measured before is not measured again.

    Raises InputError for a text of too few chunks.
    """
    base_digest = files.hash_file(setting.base)
    if setting.moments:
        Hessians.open(setting.moments, base_digest)
    keys = [_key(p, setting) for p in wanted]
    todo = [i for i, key in enumerate(keys) if not setting.store.find("probe", key)]
    for at in range(0, len(todo), AT_ONCE):
        some = todo[at : at + AT_ONCE]
        for i, reading in zip(
            some, _read([wanted[i] for i in some], setting, base_digest), strict=True
        ):
            means = reading.kld.mean(1, dtype=np.float64)
            facts = {
                "kld": float(means.mean()),
                "deviation": float(means.std(ddof=1) / math.sqrt(len(means))),
            }
            setting.store.begin("probe", keys[i])
            setting.store.commit("probe", keys[i], facts)
        told(min(at + AT_ONCE, len(todo)), len(todo))
    found = [setting.store.find("probe", key) for key in keys]
    return tuple(
        ProbeResult(p, done.facts["kld"], done.facts["deviation"])
        for p, done in zip(wanted, found, strict=True)
        if done
    )


def select_share(wanted: Sequence[Probe], part: str) -> tuple[Probe, ...]:
    """Those that the machine ``2/3`` of several measures. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    first, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= count:
        raise InputError(
            f"part: expected a number and how many there are, as in 1/3, found {part!r}"
        )
    return tuple(wanted[first - 1 :: count])


def describe_probes(setting: ProbeSetup) -> str:
    """On what probes were measured, in words that are equal only where they may be put together."""
    text, how = files.hash_file(setting.text)[:12], setting.reading
    fed_back = "".join(f", {FED_BACK} {digest[:12]}" for digest in _fed_by(setting).values())
    chunks = f"{how.chunks or 'all'} chunks of {how.context}"
    return f"{setting.text.name} ({text}, {chunks}), the rest in {setting.blanket}{fed_back}"


def probe_variant(name: str, types: Mapping[str, str], file_type: str = "Q8_0") -> Variant:
    """A variant that says the type of every tensor by its name."""
    rules = tuple(
        Rule(re.escape(tensor), kind, "One tensor of a probe.") for tensor, kind in types.items()
    )
    return Variant(name=name, summary="A probe.", file_type=file_type, rules=rules)


@cache
def _fed_by(setting: ProbeSetup) -> Mapping[str, str]:
    """By which moments rounding is fed back, and how; nothing where it is not."""
    return {"moments": f"{files.hash_file(setting.moments)} {REVISION}"} if setting.moments else {}


def _key(probe: Probe, setting: ProbeSetup) -> dict[str, Any]:
    return {**_shared(setting), "types": dict(probe.types)}


@cache
def _shared(setting: ProbeSetup) -> Mapping[str, Any]:
    """What all probes of a setting have in common."""
    return {
        "base": files.hash_file(setting.base),
        "imatrix": files.hash_file(setting.matrix) if setting.matrix else None,
        "text": files.hash_file(setting.text),
        "blanket": setting.blanket,
        **asdict(setting.reading),
        "llama.cpp": str(setting.tools.version),
        "reader": bindings_version(),
        **_fed_by(setting),
    }


def _read(some: Sequence[Probe], setting: ProbeSetup, base_digest: str) -> list[compare.Reading]:
    header = read_header(setting.base)
    folder = setting.store.work_folder("probe")
    files.remove(folder)
    targets = [
        QuantizeTarget(_plan(f"p{n}", p, header, setting.blanket), folder / f"p{n}.gguf")
        for n, p in enumerate(some)
    ]
    try:
        write_variants(
            setting.base,
            setting.matrix,
            targets,
            base_digest,
            setting.tools,
            folder / "work",
            setting.engine,
            moments=setting.moments,
        )
        digests = {
            t.path: to_canonical_json(
                [base_digest, setting.blanket, dict(p.types), *_fed_by(setting).values()]
            )
            for t, p in zip(targets, some, strict=True)
        }
        found = compare.read_texts(
            setting.base, base_digest, digests, setting.text, setting.store, setting.reading
        )
    finally:
        files.remove(folder)
    readings = [found[t.path] for t in targets]
    if (count := len(readings[0].kld)) < FEWEST_CHUNKS:
        raise InputError(
            f"{setting.text}: expected at least {FEWEST_CHUNKS} chunks to probe with, found {count}: too few to mean anything"
        )
    return readings


def _plan(name: str, probe: Probe, header: Header, blanket: str) -> Plan:
    types = {t.name: probe.types.get(t.name, blanket) for t in header.tensors if is_quantizable(t)}
    return make_plan(probe_variant(name, types), header.tensors, covered=frozenset(types))


def _in_trunk(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Without MTP blocks, which no text shows; but all of a class that is nowhere else."""
    at = compute_depths(tensors)
    inside = [t for t in tensors if at.get(t.name, 0) < 1]
    classes = {tensor_class(t.name) for t in inside}
    return inside + [t for t in tensors if tensor_class(t.name) not in classes]


def _groups(tensors: Sequence[TensorSpec], bands: int, *, singles: bool) -> dict[str, list[str]]:
    if singles:
        return {t.name: [t.name] for t in tensors}
    at = compute_depths(tensors)
    groups: dict[str, list[str]] = {}
    for t in tensors:
        depth = at.get(t.name)
        band = (
            ""
            if depth is None
            else " behind the trunk"
            if depth >= 1
            else f" band {int(depth * bands) + 1} of {bands}"
        )
        groups.setdefault(f"{tensor_class(t.name)}{band}", []).append(t.name)
    return groups


def _nearest(level: str, possible: Mapping[str, TensorError]) -> str:
    """The type to probe with: that one, else the one that stands for it, else the nearest in bits of those in the database."""
    near = next((name for name in (level, NEAREST.get(level)) if name in possible), None)
    bits = TYPES[level].bits_per_weight
    return near or min(sorted(possible), key=lambda name: abs(TYPES[name].bits_per_weight - bits))
