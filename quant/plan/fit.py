"""Estimate sensitivities from probes, and refine them with whole files.

A probe quantizes a few tensors coarsely and measures the KLD. Its logarithm is linear in the
logarithm of the probed tensors' error, so weighted least squares on logarithms give the power, then
a scale for each tensor. Noisy estimates are shrunk toward their class mean (empirical Bayes).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from quant.core.errors import InputError
from quant.llama.tensors import tensor_class
from quant.plan.error_table import ErrorTable
from quant.plan.sensitivity import ProbeResult, Sensitivities, find_additive_tensors

POWERS = 0.4, 2.5
"""Plausible range of the power; a fit outside of it is an accident of few probes."""
# A deviation of sqrt(0.02) = 0.14: no probe counts as more exact than 14 %.
MODEL_VARIANCE = 0.02
"""Variance of a log KLD that the model itself leaves unexplained, beside the probe's own noise."""
SMALLEST_KLD = 1e-7
"""Lower bound of a measured KLD in nats; below it is rounding."""
FILE_DEVIATION, CLASS_DEVIATION, TENSOR_DEVIATION = 0.1, 0.3, 0.2
"""Prior standard deviations of logarithms in ``refit_sensitivities``.

How far a whole file may be from its prediction, and how far a class or a tensor from its probes.
"""


def fit_sensitivities(
    results: Sequence[ProbeResult], table: ErrorTable, source: str
) -> Sensitivities:
    """Return the sensitivities that probes show; an unprobed tensor gets the mean of its class.

    Args:
        results: Measured probes.
        table: The quantization errors of the probed model.
        source: Description of the probes and their text, for the file and for people.

    Raises:
        InputError: Neither a tensor nor any of its class was probed.
    """
    additive = find_additive_tensors(table.errors)
    power = _fit_power(results, table, additive)
    by_tensor: dict[str, list[ProbeResult]] = {}
    for result in results:
        for name in result.probe.types:
            by_tensor.setdefault(name, []).append(result)
    estimates = {
        name: _fit_scale(of_tensor, table, 1.0 if name in additive else power)
        for name, of_tensor in by_tensor.items()
    }
    # Scales of additive tensors have another unit (KLD, not KLD^(1/p)): never average across.
    by_class: dict[tuple[str, bool], list[str]] = {}
    for name in estimates:
        by_class.setdefault((tensor_class(name), name in additive), []).append(name)
    scales = {
        name: scale
        for names in by_class.values()
        for name, scale in _shrink({n: estimates[n] for n in names}).items()
    }
    for name in table.errors:
        like = by_class.get((tensor_class(name), name in additive))
        if name not in scales and like:
            # The geometric mean: estimates are logarithms, over orders of magnitude.
            scales[name] = math.exp(sum(math.log(scales[n]) for n in like) / len(like))
    if missing := sorted(table.errors.keys() - scales.keys()):
        raise InputError(
            f"sensitivities: no probe of {missing[0]} or of its class;"
            f" {len(missing)} tensors are unknown"
        )
    return Sensitivities(
        base=table.base,
        source=source,
        # Six digits: the file is the same where the last bits of a sum differ.
        scales={n: float(f"{scales[n]:.6g}") for n in table.errors},
        power=power,
        probes=tuple(results),
    )


def refit_sensitivities(
    sensitivities: Sensitivities,
    whole_files: Sequence[tuple[Mapping[str, str], float]],
    table: ErrorTable,
    near: float | None = None,
) -> Sensitivities:
    """Return sensitivities adjusted to the measured KLD of whole files.

    Maximum a posteriori: the power, a factor for each class and one for each tensor minimize

        Σ_files ((log predicted − log measured) / σ_file)² + Σ_parameters (log factor / σ_prior)²

    so that they move only as far as the files require (Gauss-Newton by scipy's least_squares).

    Args:
        sensitivities: The prior, from probes measured on the same text.
        whole_files: Types by tensor, and measured KLD in nats, of each file.
        table: The quantization errors of the model.
        near: Trust files far from this KLD less: σ_file grows with the distance in logarithms.
    """
    from scipy.optimize import least_squares

    names = list(sensitivities.scales)
    kinds = {n: (tensor_class(n), n in sensitivities.additive) for n in names}
    classes = sorted(set(kinds.values()))
    of_class = np.array([[kinds[n] == c for c in classes] for n in names], float)
    additive = np.array([n in sensitivities.additive for n in names])
    relative = np.array(
        [[_look_up(table, n, types.get(n)) for n in names] for types, _ in whole_files]
    )
    errors = relative * np.array([sensitivities.scales[n] for n in names])
    measured = np.log(np.maximum([kld for _, kld in whole_files], SMALLEST_KLD))
    distance = (
        np.zeros(len(measured))
        if near is None
        else np.abs(measured - math.log(max(near, SMALLEST_KLD)))
    )
    sigma = FILE_DEVIATION * (1 + distance)

    # Parameters, all logarithms: power, one factor a class, one factor a tensor.
    def factors(parameters: Any) -> Any:
        return np.exp(of_class @ parameters[1 : 1 + len(classes)] + parameters[1 + len(classes) :])

    def residuals(parameters: Any) -> Any:
        scaled = errors * factors(parameters)
        power = sensitivities.power * math.exp(parameters[0])
        predicted = scaled[:, ~additive].sum(1) ** power + scaled[:, additive].sum(1)
        misfit = (np.log(np.maximum(predicted, SMALLEST_KLD)) - measured) / sigma
        return np.concatenate([misfit, parameters / prior])

    # The power has the deviation of a class.
    prior = np.array([CLASS_DEVIATION] * (1 + len(classes)) + [TENSOR_DEVIATION] * len(names))
    # It starts at factors of one, where the prior is best.
    best = least_squares(residuals, np.zeros(len(prior))).x
    return replace(
        sensitivities,
        scales={
            n: float(sensitivities.scales[n] * f) for n, f in zip(names, factors(best), strict=True)
        },
        power=float(sensitivities.power * math.exp(best[0])),
        source=f"{sensitivities.source}, refitted on {len(whole_files)} whole files",
    )


def _fit_power(
    results: Sequence[ProbeResult], table: ErrorTable, additive: frozenset[str]
) -> float:
    """Return the power: the common slope of log KLD over log error, in probes of equal tensors."""
    groups: dict[frozenset[str], list[ProbeResult]] = {}
    for result in results:
        # The error of additive tensors is outside the power.
        if not additive & result.probe.types.keys():
            groups.setdefault(frozenset(result.probe.types), []).append(result)
    xx = xy = 0.0
    for group in groups.values():
        x = np.array([math.log(_sum_relative_mse(r, table)) for r in group])
        y = np.array([math.log(max(r.kld, SMALLEST_KLD)) for r in group])
        w = np.array([1 / _log_variance(r) for r in group])
        # All probes of a group have the same tensors, so the scale is a constant that centering
        # removes. A group of one adds nothing.
        dx, dy = x - np.average(x, weights=w), y - np.average(y, weights=w)
        xx, xy = xx + float(w @ (dx * dx)), xy + float(w @ (dx * dy))
    # One slope for all groups: Σ w·dx·dy / Σ w·dx². Rounded for the reason that scales are.
    power = xy / xx if xx else 1.0
    return float(f"{min(max(power, POWERS[0]), POWERS[1]):.4g}")


def _fit_scale(
    results: Sequence[ProbeResult], table: ErrorTable, power: float
) -> tuple[float, float]:
    """Return the logarithm of a tensor's scale, and its variance."""
    w = np.array([1 / _log_variance(r) for r in results])
    # From KLD = (s·e)^p follows log s = log KLD / p − log e, whose variance is that of log KLD over
    # p².
    logs = np.array(
        [
            math.log(max(r.kld, SMALLEST_KLD)) / power - math.log(_sum_relative_mse(r, table))
            for r in results
        ]
    )
    return float(np.average(logs, weights=w)), float(1 / w.sum() / power**2)


def _shrink(estimates: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the scales of one class, noisy estimates shrunk toward the class mean."""
    logs = np.array([v for v, _ in estimates.values()])
    variances = np.array([v for _, v in estimates.values()])
    # Empirical Bayes, as Efron and Morris (1975): x̂ = m + τ²/(τ² + σ²) · (x − m), where σ² is the
    # variance of an estimate. τ², the class's own spread, is the sample variance less the mean σ².
    # A class of one tensor has no spread to estimate, and is not shrunk.
    spread = max(float(logs.var(ddof=1)) - float(variances.mean()), 0.0) if len(logs) > 1 else 0.0
    keep = spread / (spread + variances) if len(logs) > 1 else np.ones(1)
    shrunk = logs.mean() + keep * (logs - logs.mean())
    return {name: math.exp(value) for name, value in zip(estimates, shrunk, strict=True)}


def _look_up(table: ErrorTable, name: str, kind: str | None) -> float:
    by_type = table.errors[name]
    return by_type[kind].relative_mse if kind is not None and kind in by_type else 0.0


def _sum_relative_mse(result: ProbeResult, table: ErrorTable) -> float:
    types = result.probe.types.items()
    return math.fsum(table.errors[name][kind].relative_mse for name, kind in types)


def _log_variance(result: ProbeResult) -> float:
    """Return the variance of a probe's log KLD."""
    # Delta method: Var(log x) ≈ Var(x) / x². More text lowers it, but not the model's own error.
    return MODEL_VARIANCE + (result.standard_error / max(result.kld, SMALLEST_KLD)) ** 2
