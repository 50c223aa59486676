"""How much the errors of each tensor cost: what probes say of it, and what whole files add to that.

A probe's divergence against the error that its types made in the probed tensors is their sensitivity. A band of few
tensors is drawn toward its class as far as its noise asks for.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quant.core import files
from quant.errors import InputError
from quant.llama.tensors import split_block, tensor_class
from quant.plan.error_table import ErrorTable

FORMAT = "quant-sensitivity-2"
OUTPUT = "output.weight"
FURTHER = "nextn."
POWERS = 0.4, 2.5
"""Outside of these a power is an accident."""
MODEL_VARIANCE = 0.02
TINY = 1e-9
FILE_DEVIATION, CLASS_DEVIATION, TENSOR_DEVIATION = 0.1, 0.3, 0.2
"""Of logarithms: how far a whole file may be from what is predicted, and a class or a tensor from what its probes say."""
FLOOR = 1e-7
"""Divergences are taken for at least this: below, it is rounding."""


@dataclass(frozen=True)
class Probe:
    """One file in which these tensors, and no others, are coarse."""

    name: str
    types: Mapping[str, str]
    """By tensor."""


@dataclass(frozen=True)
class ProbeResult:
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
    the output matrix, and of the last block's feed-forward part, comes after everything that could amplify it, and is
    added plainly.
    """

    base: str
    """The sha256 of the BF16 file."""
    source: str
    """In words: measured on which text, or where it was taken from."""
    scales: Mapping[str, float]
    """By tensor, the noise that it makes for each unit of its relative error."""
    power: float = 1.0
    probes: tuple[ProbeResult, ...] = ()
    credit: str = ""
    """Whom figures that are not this project's own come from."""

    @cached_property
    def plain(self) -> frozenset[str]:
        """The tensors whose noise is added plainly."""
        return find_additive_tensors(self.scales)

    def noise(self, types: Mapping[str, str], errors: ErrorTable) -> tuple[float, float]:
        """Of a file with these types: what is inside the power, and what is added plainly."""
        made = {
            name: self.scales[name] * errors.errors[name][kind].share
            for name, kind in types.items()
            if kind in errors.errors.get(name, {})
        }
        plain = math.fsum(noise for name, noise in made.items() if name in self.plain)
        return math.fsum(made.values()) - plain, plain

    def predicted(self, types: Mapping[str, str], errors: ErrorTable) -> float:
        """The divergence of a file with these types; tensors of other types, such as BF16, make no noise."""
        inside, plain = self.noise(types, errors)
        return float(max(inside, 0.0) ** self.power) + plain

    def damage(self, errors: ErrorTable, inside: float) -> dict[str, dict[str, float]]:
        """What each type of each tensor adds to the divergence where the noise is that much: the tangent there."""
        steep = self.power * max(inside, TINY) ** (self.power - 1)
        weight = {
            name: scale * (1.0 if name in self.plain else steep)
            for name, scale in self.scales.items()
        }
        return {
            n: {kind: weight[n] * e.share for kind, e in by_type.items()}
            for n, by_type in errors.errors.items()
        }

    def json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "form": FORMAT,
            "base": self.base,
            "source": self.source,
            "credit": self.credit,
            "power": self.power,
            "scales": dict(self.scales),
            "probes": [
                {
                    "name": m.probe.name,
                    "types": dict(m.probe.types),
                    "kld": m.kld,
                    "deviation": m.deviation,
                }
                for m in self.probes
            ],
        }


def find_additive_tensors(names: Iterable[str]) -> frozenset[str]:
    """Of these tensors those behind everything that amplifies noise: behind the last router, and the last attention."""
    blocks: dict[int, list[str]] = {}
    for name in names:
        block, rest = split_block(name)
        if block is not None:
            blocks.setdefault(block, []).append(rest)
    trunk = [
        n for n, parts in blocks.items() if not any(part.startswith(FURTHER) for part in parts)
    ]
    last = {
        f"blk.{n}.{part}"
        for n in sorted(trunk)[-1:]
        for part in blocks[n]
        if part.startswith("ffn_")
    }
    return frozenset(last | {OUTPUT})


def fit_sensitivities(
    measured: Sequence[ProbeResult], errors: ErrorTable, source: str
) -> Sensitivities:
    """What the probes say of every tensor. One that no probe held is like the mean of its class.

    Raises InputError when there is a tensor of which nothing is known, nor of one like it.
    """
    plain = find_additive_tensors(errors.errors)
    power = _power(measured, errors, plain)
    held: dict[str, list[ProbeResult]] = {}
    for m in measured:
        for name in m.probe.types:
            held.setdefault(name, []).append(m)
    known = {
        name: _scale(found, errors, 1.0 if name in plain else power) for name, found in held.items()
    }
    by_class: dict[tuple[str, bool], list[str]] = {}
    for name in known:  # scales of noise that is added plainly are of another unit
        by_class.setdefault((tensor_class(name), name in plain), []).append(name)
    scales = {
        name: scale
        for names in by_class.values()
        for name, scale in _drawn({n: known[n] for n in names}).items()
    }
    for name in errors.errors:
        if name not in scales and (like := by_class.get((tensor_class(name), name in plain))):
            scales[name] = math.exp(sum(math.log(scales[n]) for n in like) / len(like))
    if missing := sorted(errors.errors.keys() - scales.keys()):
        raise InputError(
            f"sensitivities: no probe held {missing[0]} or one like it; {len(missing)} tensors are unknown"
        )
    return Sensitivities(
        errors.base,
        source,
        {n: float(f"{scales[n]:.6g}") for n in errors.errors},
        power,
        tuple(measured),
    )


def refit_sensitivities(
    found: Sensitivities,
    files_measured: Sequence[tuple[Mapping[str, str], float]],
    errors: ErrorTable,
    near: float | None = None,
) -> Sensitivities:
    """Sensitivities mended by whole files that were measured on the same text: their types, and what they did.

    The power, a factor for each class and one for each tensor are moved as little as the files ask for. Where the answer
    is wanted for files of some divergence, ``near`` that, files far from it are believed less.
    """
    from scipy.optimize import least_squares

    names = list(found.scales)
    kinds = {n: (tensor_class(n), n in found.plain) for n in names}
    classes = sorted(set(kinds.values()))
    of_class = np.array([[kinds[n] == c for c in classes] for n in names], float)
    plain = np.array([n in found.plain for n in names])
    shares = np.array(
        [[_lost(errors, n, types.get(n)) for n in names] for types, _ in files_measured]
    )
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
    return replace(
        found, scales=scales, power=float(found.power * math.exp(best[0])), source=source
    )


def write_sensitivities(path: Path, found: Sensitivities) -> None:
    """Write sensitivities, which may be published and used again."""
    files.write_text(path, json.dumps(found.json(), indent=1) + "\n")


def read_sensitivities(path: Path, base: str | None = None) -> Sensitivities:
    """Sensitivities that were written before. Raises InputError for another file, and for another model's."""
    try:
        told = json.loads(path.read_text())
        if told["form"] != FORMAT:
            raise ValueError(f"form {told['form']!r}")
        measured = tuple(
            ProbeResult(Probe(p["name"], p["types"]), p["kld"], p["deviation"])
            for p in told["probes"]
        )
        found = Sensitivities(
            told["base"], told["source"], told["scales"], told["power"], measured, told["credit"]
        )
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: expected sensitivities ({FORMAT}), found something else ({e})"
        ) from e
    if base and found.base != base:
        raise InputError(
            f"{path}: of another model: its base is {found.base[:12]}…, this one is {base[:12]}…"
        )
    return found


def _power(measured: Sequence[ProbeResult], errors: ErrorTable, plain: frozenset[str]) -> float:
    """How divergence grows with noise: from probes of the same tensors at several types, all of them together."""
    same: dict[frozenset[str], list[ProbeResult]] = {}
    for m in measured:
        if not plain & m.probe.types.keys():
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


def _scale(found: Sequence[ProbeResult], errors: ErrorTable, power: float) -> tuple[float, float]:
    """The logarithm of a tensor's scale, and the variance of that."""
    w = np.array([1 / _variance(m) for m in found])
    logs = np.array(
        [math.log(max(m.kld, FLOOR)) / power - math.log(_share(m, errors)) for m in found]
    )
    return float(np.average(logs, weights=w)), float(1 / w.sum() / power**2)


def _drawn(known: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Scales of one class, each drawn toward their mean as far as its noise asks for (empirical Bayes)."""
    logs, noise = np.array([v for v, _ in known.values()]), np.array([n for _, n in known.values()])
    spread = max(float(logs.var(ddof=1)) - float(noise.mean()), 0.0) if len(logs) > 1 else 0.0
    keep = spread / (spread + noise) if len(logs) > 1 else np.ones(1)
    drawn = logs.mean() + keep * (logs - logs.mean())
    return {name: math.exp(value) for name, value in zip(known, drawn, strict=True)}


def _lost(errors: ErrorTable, name: str, kind: str | None) -> float:
    known = errors.errors[name]
    return known[kind].share if kind is not None and kind in known else 0.0


def _share(m: ProbeResult, errors: ErrorTable) -> float:
    return math.fsum(errors.errors[name][kind].share for name, kind in m.probe.types.items())


def _variance(m: ProbeResult) -> float:
    """Of the logarithm of a probe's divergence: its own noise, and what the model of noise does not know."""
    return MODEL_VARIANCE + (m.deviation / max(m.kld, FLOOR)) ** 2
