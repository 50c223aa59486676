"""Predict the KLD of a file from the quantization errors of its tensors.

The model, with e_t the relative weighted MSE of tensor t and s_t its sensitivity:

    KLD = (Σ s_t · e_t over amplified tensors)^p + Σ s_t · e_t over additive tensors

The power p describes how errors amplify each other. In a mixture of experts even small errors route
tokens to other experts, so p is below 1 (0.64 on tiny-glm); in small dense models it is above 1.
Additive tensors lie behind the last router and the last attention: the output matrix, and the
feed-forward part of the last block. Nothing amplifies their error. A plain sum of the KLDs that
single tensors cause predicts twice what whole files show.

``quant.plan.fit`` estimates s and p from probes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.errors import InputError
from quant.llama.tensors import OUTPUT, split_block
from quant.plan.error_table import ErrorTable, check_base

FORMAT = "quant-sensitivity-2"
"""Value of the key ``form``, by which such a file is recognized."""
MTP_PREFIX = "nextn."
SMALLEST_ERROR = 1e-9
"""Lower bound of an error sum, where the slope of a power below 1 would be infinite."""


@dataclass(frozen=True)
class Probe:
    """A file in which these tensors, and no others, are quantized coarsely."""

    name: str
    types: Mapping[str, str]
    """Type by tensor."""


@dataclass(frozen=True)
class ProbeResult:
    """The measured KLD of a probe."""

    probe: Probe
    kld: float
    """Mean over tokens, in nats."""
    standard_error: float
    """Standard error of the mean, over chunks."""


@dataclass(frozen=True)
class Sensitivities:
    """How much the quantization error of each tensor of one model costs."""

    base: str
    """sha256 of the BF16 file."""
    source: str
    """Where the numbers come from: probes and their text, or priors."""
    scales: Mapping[str, float]
    """Sensitivity by tensor: error per unit of relative weighted MSE."""
    power: float = 1.0
    """Exponent of the summed error of amplified tensors."""
    probes: tuple[ProbeResult, ...] = ()
    """The measurements behind the scales."""
    credit: str = ""
    """Attribution of figures that are not this project's own."""

    @cached_property
    def additive(self) -> frozenset[str]:
        """Tensors whose error is added outside the power."""
        return find_additive_tensors(self.scales)

    def sum_errors(self, types: Mapping[str, str], table: ErrorTable) -> tuple[float, float]:
        """Return Σ s·e of a file, over amplified and over additive tensors.

        Args:
            types: Type by tensor. Types outside the table, such as BF16, have no error.
            table: Relative weighted MSE by tensor and type.
        """
        errors = {
            name: self.scales[name] * table.errors[name][kind].relative_mse
            for name, kind in types.items()
            if kind in table.errors.get(name, {})
        }
        additive = math.fsum(error for name, error in errors.items() if name in self.additive)
        # The amplified part as a difference: fsum over all is exact, so nothing is counted twice.
        return math.fsum(errors.values()) - additive, additive

    def predict_kld(self, types: Mapping[str, str], table: ErrorTable) -> float:
        """Return the predicted mean KLD of a file in nats; arguments as ``sum_errors``."""
        amplified, additive = self.sum_errors(types, table)
        # The difference may be just below zero, and a power of that is a complex number.
        return float(max(amplified, 0.0) ** self.power) + additive

    def linearize(self, table: ErrorTable, amplified: float) -> dict[str, dict[str, float]]:
        """Return the KLD that each type of each tensor adds, by tensor and type.

        It is the tangent of the prediction where the error sum of amplified tensors is
        ``amplified``: d KLD / d e_t = p · amplified^(p − 1) · s_t. A linear cost is what a knapsack
        solver needs.
        """
        slope = self.power * max(amplified, SMALLEST_ERROR) ** (self.power - 1)
        weight = {
            name: scale * (1.0 if name in self.additive else slope)
            for name, scale in self.scales.items()
        }
        return {
            name: {kind: weight[name] * e.relative_mse for kind, e in by_type.items()}
            for name, by_type in table.errors.items()
        }

    def json(self) -> dict[str, Any]:
        """Return the sensitivities as plain JSON values, as the file has them."""
        probes = [
            {
                "name": r.probe.name,
                "types": dict(r.probe.types),
                "kld": r.kld,
                # An older name: existing files have this key.
                "deviation": r.standard_error,
            }
            for r in self.probes
        ]
        return {
            "form": FORMAT,
            "base": self.base,
            "source": self.source,
            "credit": self.credit,
            "power": self.power,
            "scales": dict(self.scales),
            "probes": probes,
        }


def find_additive_tensors(names: Iterable[str]) -> frozenset[str]:
    """Return those of these tensors whose error nothing amplifies.

    They are ``output.weight`` and the feed-forward part of the last trunk block. MTP blocks are no
    part of the trunk.
    """
    blocks: dict[int, list[str]] = {}
    for name in names:
        block, rest = split_block(name)
        if block is not None:
            blocks.setdefault(block, []).append(rest)
    trunk = [n for n, parts in blocks.items() if not any(p.startswith(MTP_PREFIX) for p in parts)]
    last = sorted(trunk)[-1:]
    feed_forward = {f"blk.{n}.{p}" for n in last for p in blocks[n] if p.startswith("ffn_")}
    return frozenset(feed_forward | {OUTPUT})


def write_sensitivities(path: Path, sensitivities: Sensitivities) -> None:
    """Write sensitivities as JSON; the file may be published and used again."""
    files.write_text(path, json.dumps(sensitivities.json(), indent=1) + "\n")


def read_sensitivities(path: Path, base: str | None = None) -> Sensitivities:
    """Return sensitivities that ``write_sensitivities`` wrote.

    Args:
        path: The file.
        base: sha256 of the BF16 file that they must be of; None accepts any.

    Raises:
        InputError: The file cannot be read, is something else, or belongs to another model.
    """
    try:
        document = json.loads(path.read_text())
        if document["form"] != FORMAT:
            raise ValueError(f"form {document['form']!r}")
        sensitivities = Sensitivities(
            base=document["base"],
            source=document["source"],
            scales=document["scales"],
            power=document["power"],
            probes=tuple(
                ProbeResult(Probe(p["name"], p["types"]), p["kld"], p["deviation"])
                for p in document["probes"]
            ),
            credit=document["credit"],
        )
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: expected sensitivities ({FORMAT}), found something else ({e})"
        ) from e
    check_base(path, sensitivities.base, base)
    return sensitivities
