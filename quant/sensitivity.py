"""How much each part of a model matters: probes, in which only a few tensors are coarse, and what they did to the text.

A probe is a file like the base in all but the probed tensors. Its divergence from the base, measured on text that is not
the one that results are judged by, against the error that its types made there, is the sensitivity of these tensors.
Small models are probed tensor by tensor, at several types; large ones by class and depth, and a band of few tensors is
drawn toward its class as far as its noise asks for.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quant import evaluate, files
from quant.distortion import Distortions, Error
from quant.engine.job import Settings as Engine
from quant.errors import InputError
from quant.footprint import class_of
from quant.ggml_types import TYPES
from quant.header import Header, TensorSpec, read_header
from quant.plan import Plan, depths, plan, quantizable
from quant.quantize import Target, write
from quant.recipe import Rule, Variant
from quant.store import Store
from quant.toolchain import Toolchain

FORM = "quant-sensitivity-1"
LEVELS = ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q4_K")
"""Types of probes: from the coarsest that anyone would take to one that is nearly harmless."""
NEAREST = {"IQ1_S": "Q2_K", "IQ1_M": "Q2_K", "IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "Q2_K", "IQ3_XXS": "IQ3_S"}
"""For tensors without imatrix data."""
BANDS = 4
CHEAP_BANDS, CHEAP_LEVEL = 3, "IQ2_XXS"
SINGLE_BELOW = 200
"""Models with fewer matrices are probed tensor by tensor."""
FEWEST_CHUNKS = 8
"""With fewer, the noise of a probe is not known."""
AT_ONCE = 12
"""Probe files that lie on the disk at a time."""
PLAIN = frozenset({"output.weight"})
"""Tensors behind everything that amplifies noise."""
POWERS = 0.4, 2.5
"""Outside of these a power is an accident."""
MODEL_VARIANCE = 0.02
TINY = 1e-9
FILE_DEVIATION, CLASS_DEVIATION, TENSOR_DEVIATION = 0.1, 0.3, 0.2
"""Of logarithms: how far a whole file may be from what is predicted, and a class or a tensor from what its probes say."""
BYTES_PER_TOKEN = 4
"""Of a text, about, for a forecast."""
FLOOR = 1e-7
"""Divergences are taken for at least this: below, it is rounding."""


@dataclass(frozen=True)
class Probe:
    """One file in which these tensors, and no others, are coarse."""

    name: str
    types: Mapping[str, str]
    """By tensor."""


@dataclass(frozen=True)
class Measured:
    """What a probe did."""

    probe: Probe
    kld: float
    deviation: float
    """Standard error of the mean, over chunks."""


@dataclass(frozen=True)
class Sensitivities:
    """How much the errors of one model's tensors cost.

    The noise that tensors make adds up, and the divergence is a power of the sum: in a mixture of experts a little noise
    already sends tokens to other experts, so the power is below one, and in small dense models it is above. The noise of
    the output matrix comes after everything that could amplify it, and is added plainly.
    """

    base: str
    """The sha256 of the BF16 file."""
    source: str
    """In words: measured on which text, or where it was taken from."""
    scales: Mapping[str, float]
    """By tensor, the noise that it makes for each unit of its relative error."""
    power: float = 1.0
    probes: tuple[Measured, ...] = ()
    credit: str = ""
    """Whom figures that are not this project's own come from."""

    def noise(self, types: Mapping[str, str], errors: Distortions) -> tuple[float, float]:
        """Of a file with these types: what is inside the power, and what is added plainly."""
        made = {
            name: self.scales[name] * errors.errors[name][kind].share
            for name, kind in types.items()
            if kind in errors.errors.get(name, {})
        }
        plain = math.fsum(noise for name, noise in made.items() if name in PLAIN)
        return math.fsum(made.values()) - plain, plain

    def predicted(self, types: Mapping[str, str], errors: Distortions) -> float:
        """The divergence of a file with these types; tensors of other types, such as BF16, make no noise."""
        inside, plain = self.noise(types, errors)
        return float(max(inside, 0.0) ** self.power) + plain

    def damage(self, errors: Distortions, inside: float) -> dict[str, dict[str, float]]:
        """What each type of each tensor adds to the divergence where the noise is that much: the tangent there."""
        steep = self.power * max(inside, TINY) ** (self.power - 1)
        weight = {name: scale * (1.0 if name in PLAIN else steep) for name, scale in self.scales.items()}
        return {n: {kind: weight[n] * e.share for kind, e in by_type.items()} for n, by_type in errors.errors.items()}

    def json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "form": FORM, "base": self.base, "source": self.source, "credit": self.credit, "power": self.power,
            "scales": dict(self.scales),
            "probes": [{"name": m.probe.name, "types": dict(m.probe.types), "kld": m.kld, "deviation": m.deviation}
                       for m in self.probes],
        }  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Everything that probes are made and measured with."""

    base: Path
    matrix: Path | None
    text: Path
    """Calibration-side: never what files are judged by."""
    tools: Toolchain
    store: Store
    reading: evaluate.Settings
    blanket: str = "BF16"
    """Type of everything that is not probed; Q8_0 for models whose BF16 file is too large to be read so often."""
    engine: Engine = field(default_factory=Engine)


def probes(
    tensors: Sequence[TensorSpec], errors: Distortions, levels: Sequence[str] = LEVELS, *, cheap: bool = False
) -> tuple[Probe, ...]:  # fmt: skip
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


def forecast(wanted: Sequence[Probe], setting: Setting) -> str:
    """What measuring costs, in words, before it begins."""
    header = read_header(setting.base)
    todo = [p for p in wanted if not setting.store.find("probe", _key(p, setting))]
    sizes = [_plan("probe", p, header, setting.blanket).bytes for p in todo]
    tokens = setting.reading.chunks or setting.text.stat().st_size // BYTES_PER_TOKEN // setting.reading.context
    return (
        f"{len(todo)} of {len(wanted)} probes are to be measured: each a file of about {max(sizes, default=0):,} bytes, at"
        f" most {AT_ONCE} of them on the disk at a time, which reads {tokens} chunks of {setting.reading.context} tokens"
    )


def measure(
    wanted: Sequence[Probe], setting: Setting, told: Callable[[int, int], None] = lambda done, of: None
) -> tuple[Measured, ...]:
    """What each probe does; what was measured before is not measured again.

    Raises InputError for a text of too few chunks.
    """
    base_digest = files.digest(setting.base)
    keys = [_key(p, setting) for p in wanted]
    todo = [i for i, key in enumerate(keys) if not setting.store.find("probe", key)]
    for at in range(0, len(todo), AT_ONCE):
        some = todo[at : at + AT_ONCE]
        for i, reading in zip(some, _read([wanted[i] for i in some], setting, base_digest), strict=True):
            means = reading.kld.mean(1, dtype=np.float64)
            facts = {"kld": float(means.mean()), "deviation": float(means.std(ddof=1) / math.sqrt(len(means)))}
            setting.store.begin("probe", keys[i])
            setting.store.settle("probe", keys[i], facts)
        told(min(at + AT_ONCE, len(todo)), len(todo))
    found = [setting.store.find("probe", key) for key in keys]
    return tuple(
        Measured(p, done.facts["kld"], done.facts["deviation"]) for p, done in zip(wanted, found, strict=True) if done
    )


def fit(measured: Sequence[Measured], errors: Distortions, source: str) -> Sensitivities:
    """What the probes say of every tensor. One that no probe held is like the mean of its class.

    Raises InputError when there is a tensor of which nothing is known, nor of one like it.
    """
    power = _power(measured, errors)
    held: dict[str, list[Measured]] = {}
    for m in measured:
        for name in m.probe.types:
            held.setdefault(name, []).append(m)
    known = {name: _scale(found, errors, 1.0 if name in PLAIN else power) for name, found in held.items()}
    by_class: dict[str, list[str]] = {}
    for name in known:
        by_class.setdefault(class_of(name), []).append(name)
    scales = {
        name: scale for names in by_class.values() for name, scale in _drawn({n: known[n] for n in names}).items()
    }
    for name in errors.errors:
        if name not in scales and (like := by_class.get(class_of(name))):
            scales[name] = math.exp(sum(math.log(scales[n]) for n in like) / len(like))
    if missing := sorted(errors.errors.keys() - scales.keys()):
        raise InputError(
            f"sensitivities: no probe held {missing[0]} or one like it; {len(missing)} tensors are unknown"
        )
    return Sensitivities(
        errors.base, source, {n: float(f"{scales[n]:.6g}") for n in errors.errors}, power, tuple(measured)
    )


def refit(
    found: Sensitivities, files_measured: Sequence[tuple[Mapping[str, str], float]], errors: Distortions,
    near: float | None = None,
) -> Sensitivities:  # fmt: skip
    """Sensitivities mended by whole files that were measured on the same text: their types, and what they did.

    The power, a factor for each class and one for each tensor are moved as little as the files ask for. Where the answer
    is wanted for files of some divergence, ``near`` that, files far from it are believed less.
    """
    from scipy.optimize import least_squares

    names = list(found.scales)
    classes = sorted({class_of(n) for n in names})
    of_class = np.array([[class_of(n) == c for c in classes] for n in names], float)
    plain = np.array([n in PLAIN for n in names])
    shares = np.array([[_lost(errors, n, types.get(n)) for n in names] for types, _ in files_measured])
    made = shares * np.array([found.scales[n] for n in names])
    measured = np.log(np.maximum([kld for _, kld in files_measured], FLOOR))
    far = np.zeros(len(measured)) if near is None else np.abs(measured - math.log(max(near, FLOOR)))
    doubt = FILE_DEVIATION * (1 + far)

    def factors(by: Any) -> Any:
        return np.exp(of_class @ by[1 : 1 + len(classes)] + by[1 + len(classes) :])

    def residuals(by: Any) -> Any:
        noise = made * factors(by)
        told = noise[:, ~plain].sum(1) ** (found.power * math.exp(by[0])) + noise[:, plain].sum(1)
        return np.concatenate([(np.log(np.maximum(told, FLOOR)) - measured) / doubt, by / allowed])

    allowed = np.array([CLASS_DEVIATION] * (1 + len(classes)) + [TENSOR_DEVIATION] * len(names))
    best = least_squares(residuals, np.zeros(len(allowed))).x
    scales = {n: float(found.scales[n] * f) for n, f in zip(names, factors(best), strict=True)}
    source = f"{found.source}, refitted on {len(files_measured)} whole files"
    return replace(found, scales=scales, power=float(found.power * math.exp(best[0])), source=source)


def write_file(path: Path, found: Sensitivities) -> None:
    """Write sensitivities, which may be published and used again."""
    files.write_text(path, json.dumps(found.json(), indent=1) + "\n")


def read_file(path: Path, base: str | None = None) -> Sensitivities:
    """Sensitivities that were written before. Raises InputError for another file, and for another model's."""
    try:
        told = json.loads(path.read_text())
        if told["form"] != FORM:
            raise ValueError(f"form {told['form']!r}")
        measured = tuple(Measured(Probe(p["name"], p["types"]), p["kld"], p["deviation"]) for p in told["probes"])
        found = Sensitivities(
            told["base"], told["source"], told["scales"], told["power"], measured, told["credit"]
        )  # fmt: skip
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: expected sensitivities ({FORM}), found something else ({e})") from e
    if base and found.base != base:
        raise InputError(f"{path}: of another model: its base is {found.base[:12]}…, this one is {base[:12]}…")
    return found


def variant_of(name: str, types: Mapping[str, str], file_type: str = "Q8_0") -> Variant:
    """A variant that says the type of every tensor by its name."""
    rules = tuple(Rule(re.escape(tensor), kind, "One tensor of a probe.") for tensor, kind in types.items())
    return Variant(name=name, summary="A probe.", file_type=file_type, rules=rules)


def _key(probe: Probe, setting: Setting) -> dict[str, Any]:
    return {**_shared(setting), "types": dict(probe.types)}


@cache
def _shared(setting: Setting) -> Mapping[str, Any]:
    """What all probes of a setting have in common."""
    return {
        "base": files.digest(setting.base), "imatrix": files.digest(setting.matrix) if setting.matrix else None,
        "text": files.digest(setting.text), "blanket": setting.blanket, **asdict(setting.reading),
        "llama.cpp": str(setting.tools.version), "reader": evaluate.scorer_version(),
    }  # fmt: skip


def _read(some: Sequence[Probe], setting: Setting, base_digest: str) -> list[evaluate.Reading]:
    header = read_header(setting.base)
    folder = setting.store.scratch("probe")
    files.remove(folder)
    targets = [Target(_plan(f"p{n}", p, header, setting.blanket), folder / f"p{n}.gguf") for n, p in enumerate(some)]
    try:
        write(setting.base, setting.matrix, targets, base_digest, setting.tools, folder / "work", setting.engine)
        digests = {
            t.path: files.canonical([base_digest, setting.blanket, dict(p.types)])
            for t, p in zip(targets, some, strict=True)
        }
        found = evaluate.read(setting.base, base_digest, digests, setting.text, setting.store, setting.reading)
    finally:
        files.remove(folder)
    readings = [found[t.path] for t in targets]
    if (count := len(readings[0].kld)) < FEWEST_CHUNKS:
        raise InputError(
            f"{setting.text}: expected at least {FEWEST_CHUNKS} chunks to probe with, found {count}: too few to mean anything"
        )
    return readings


def _plan(name: str, probe: Probe, header: Header, blanket: str) -> Plan:
    types = {t.name: probe.types.get(t.name, blanket) for t in header.tensors if quantizable(t)}
    return plan(variant_of(name, types), header.tensors, covered=frozenset(types))


def share(wanted: Sequence[Probe], part: str) -> tuple[Probe, ...]:
    """Those that the machine ``2/3`` of several measures. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    first, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= count:
        raise InputError(f"part: expected a number and how many there are, as in 1/3, found {part!r}")
    return tuple(wanted[first - 1 :: count])


def told(setting: Setting) -> str:
    """On what probes were measured, in words that are equal only where they may be put together."""
    text, how = files.digest(setting.text)[:12], setting.reading
    return f"{setting.text.name} ({text}, {how.chunks or 'all'} chunks of {how.context}), the rest in {setting.blanket}"


def _in_trunk(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Without MTP blocks, which no text shows; but all of a class that is nowhere else."""
    at = depths(tensors)
    inside = [t for t in tensors if at.get(t.name, 0) < 1]
    classes = {class_of(t.name) for t in inside}
    return inside + [t for t in tensors if class_of(t.name) not in classes]


def _groups(tensors: Sequence[TensorSpec], bands: int, *, singles: bool) -> dict[str, list[str]]:
    if singles:
        return {t.name: [t.name] for t in tensors}
    at = depths(tensors)
    groups: dict[str, list[str]] = {}
    for t in tensors:
        depth = at.get(t.name)
        band = (
            "" if depth is None else " behind the trunk" if depth >= 1 else f" band {int(depth * bands) + 1} of {bands}"
        )
        groups.setdefault(f"{class_of(t.name)}{band}", []).append(t.name)
    return groups


def _nearest(level: str, possible: Mapping[str, Error]) -> str:
    """The type to probe with: that one, else the one that stands for it, else the nearest in bits of those in the database."""
    near = next((name for name in (level, NEAREST.get(level)) if name in possible), None)
    bits = TYPES[level].bits_per_weight
    return near or min(sorted(possible), key=lambda name: abs(TYPES[name].bits_per_weight - bits))


def _power(measured: Sequence[Measured], errors: Distortions) -> float:
    """How divergence grows with noise: from probes of the same tensors at several types, all of them together."""
    same: dict[frozenset[str], list[Measured]] = {}
    for m in measured:
        if not PLAIN & m.probe.types.keys():
            same.setdefault(frozenset(m.probe.types), []).append(m)
    across = along = 0.0
    for found in same.values():
        x = np.array([math.log(_share(m, errors)) for m in found])
        y = np.array([math.log(max(m.kld, FLOOR)) for m in found])
        w = np.array([1 / _variance(m) for m in found])
        dx, dy = x - np.average(x, weights=w), y - np.average(y, weights=w)
        across, along = across + float(w @ (dx * dx)), along + float(w @ (dx * dy))
    power = along / across if across else 1.0
    return float(f"{min(max(power, POWERS[0]), POWERS[1]):.4g}")


def _scale(found: Sequence[Measured], errors: Distortions, power: float) -> tuple[float, float]:
    """The logarithm of a tensor's scale, and the variance of that."""
    w = np.array([1 / _variance(m) for m in found])
    logs = np.array([math.log(max(m.kld, FLOOR)) / power - math.log(_share(m, errors)) for m in found])
    return float(np.average(logs, weights=w)), float(1 / w.sum() / power**2)


def _drawn(known: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Scales of one class, each drawn toward their mean as far as its noise asks for (empirical Bayes)."""
    logs, noise = np.array([v for v, _ in known.values()]), np.array([n for _, n in known.values()])
    spread = max(float(logs.var(ddof=1)) - float(noise.mean()), 0.0) if len(logs) > 1 else 0.0
    keep = spread / (spread + noise) if len(logs) > 1 else np.ones(1)
    drawn = logs.mean() + keep * (logs - logs.mean())
    return {name: math.exp(value) for name, value in zip(known, drawn, strict=True)}


def _lost(errors: Distortions, name: str, kind: str | None) -> float:
    known = errors.errors[name]
    return known[kind].share if kind is not None and kind in known else 0.0


def _share(m: Measured, errors: Distortions) -> float:
    return math.fsum(errors.errors[name][kind].share for name, kind in m.probe.types.items())


def _variance(m: Measured) -> float:
    """Of the logarithm of a probe's divergence: its own noise, and what the model of noise does not know."""
    return MODEL_VARIANCE + (m.deviation / max(m.kld, FLOOR)) ** 2
