"""Write a variant as TOML that a person can read and change. Pure."""

import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

import tomli_w

from quant.plan.allocate import Allocation
from quant.plan.recipe import Rule, Variant
from quant.plan.sensitivity import Sensitivities

# What TOML forbids in comments and in literal strings: control characters but tab.
_CONTROL = r"\x00-\x08\x0a-\x1f\x7f"
_LITERAL = re.compile(rf"[^'{_CONTROL}]*")


def format_variant(variant: Variant, comments: Iterable[str] = ()) -> str:
    """Return a variant as TOML that ``load_variant`` reads as the same variant.

    Args:
        variant: The variant.
        comments: Lines to put before it; characters that TOML forbids become spaces.
    """
    lines = [re.sub(f"[{_CONTROL}]+", " ", f"# {comment}").rstrip() for comment in comments]
    lines += _format_fields(variant)
    for rule in variant.rules:
        lines += ["", "[[rules]]", *_format_fields(rule)]
    return "\n".join(lines) + "\n"


def format_allocation(allocation: Allocation, sensitivities: Sensitivities) -> str:
    """Return an allocated variant as TOML, with its size, predicted KLD and sources on top.

    Args:
        allocation: The variant, and how good it is.
        sensitivities: What it was allocated with; source and credit are named.
    """
    a, comments = allocation, []
    comments.append(
        f"Made by `quant allocate` for {a.target.bytes:,} bytes: {a.bytes:,},"
        f" predicted mean KLD {a.solution.kld:.4g},"
    )
    comments.append(f"{_describe_quality(a)}. Sensitivities: {sensitivities.source}.")
    comments += [sensitivities.credit] if sensitivities.credit else []
    return format_variant(a.variant, comments)


def _describe_quality(allocation: Allocation) -> str:
    if allocation.measured_kld is not None:
        kld = f"{allocation.measured_kld:.4g}"
        return f"measured {kld} on the probes' text: the best of the files that were built"
    return f"at most {100 * allocation.solution.gap:.3f} % above the best possible"


def _format_fields(noun: Variant | Rule) -> list[str]:
    """Return a line for every field that is not at its default; rules are tables of their own."""
    return [
        _format_field(f.name, value)
        for f in fields(noun)
        if f.name != "rules"
        and ((value := getattr(noun, f.name)) != f.default or f.default is MISSING)
    ]


def _format_field(key: str, value: Any) -> str:
    """Return ``key = value``, by tomli_w."""
    # tomli_w cannot write literal strings: '\d+' reads better than "\\d+".
    if key == "tensors" and _LITERAL.fullmatch(value):
        return f"{key} = '{value}'"
    plain = list(value) if isinstance(value, tuple) else value
    return tomli_w.dumps({key: plain}).strip()
