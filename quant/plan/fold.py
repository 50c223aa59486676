"""Fold a type for every tensor into rules that a person can read, and back into a recipe's text. Pure."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.llama.tensors import split_block, tensor_class
from quant.plan.recipe import Rule, Variant

FILE_TYPES = {
    "IQ1_S": "IQ1_S",
    "IQ1_M": "IQ1_M",
    "IQ2_XXS": "IQ2_XXS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_S",
    "Q2_K": "Q2_K",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_S": "IQ3_S",
    "Q3_K": "Q3_K_M",
    "IQ4_XS": "IQ4_XS",
    "IQ4_NL": "IQ4_NL",
    "Q4_K": "Q4_K_M",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q5_K": "Q5_K_M",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
    "BF16": "BF16",
}
"""What a file is called whose weights are mostly of a type."""


@dataclass(frozen=True)
class _Part:
    """Tensors of some classes, in some blocks, that have one type."""

    classes: tuple[str, ...]
    type: str
    blocks: tuple[int, ...]
    rest: bool
    """Every other block of these classes has this type."""


def fold_types(
    name: str, summary: str, types: Mapping[str, str], tensors: Sequence[TensorSpec]
) -> Variant:
    """The variant that gives these tensors these types, in as few rules as tell it plainly.

    Classes that have the same types in the same blocks share their rules. Of a class the rarer types come first with
    their blocks, and the commonest takes the rest.
    """
    weights: dict[str, int] = {}
    for t in tensors:
        if t.name in types:
            weights[types[t.name]] = weights.get(types[t.name], 0) + t.elements
    most = max(weights, key=lambda kind: weights[kind])
    rules = tuple(_rule(part) for part in _parts(types))
    return Variant(name=name, summary=summary, file_type=FILE_TYPES.get(most, "Q8_0"), rules=rules)


def format_variant(variant: Variant, comments: Iterable[str] = ()) -> str:
    """A variant as the TOML that reads as the same variant."""
    lines = [f"# {line}".rstrip() for line in comments]
    lines += [
        f'name = "{variant.name}"',
        f'summary = "{variant.summary}"',
        f'file_type = "{variant.file_type}"',
    ]
    lines += [] if variant.split else ["split = false"]
    lines += [] if variant.answers == 1.0 else [f"answers = {variant.answers}"]
    for rule in variant.rules:
        lines += [
            "",
            "[[rules]]",
            f"tensors = '{rule.tensors}'",
            f'type = "{rule.type}"',
            f'why = "{rule.why}"',
        ]
        lines += [f'narrow = "{rule.narrow}"'] if rule.narrow else []
        lines += ["optional = true"] if rule.optional else []
    return "\n".join(lines) + "\n"


def format_block_pattern(wanted: Sequence[int]) -> str:
    """A regular expression for exactly these block numbers, whole tens written as such."""
    left, parts = sorted(set(wanted)), []
    tens: dict[int, list[int]] = {}
    for n in left:
        tens.setdefault(n // 10, []).append(n % 10)
    for ten, digits in tens.items():
        last = (
            str(digits[0])
            if len(digits) == 1
            else r"\d"
            if len(digits) == 10
            else f"[{_digits(digits)}]"
        )
        parts.append(f"{ten or ''}{last}")
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _digits(digits: Sequence[int]) -> str:
    """0124 as it stands, 0123 as 0-3."""
    runs: list[list[int]] = []
    for d in digits:
        if runs and d == runs[-1][-1] + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    return "".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else "".join(map(str, r)) for r in runs)


def _parts(types: Mapping[str, str]) -> Iterator[_Part]:
    by_class: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        block, _ = split_block(name)
        by_class.setdefault(tensor_class(name), {})[-1 if block is None else block] = kind
    alike: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for name, kinds in by_class.items():
        alike.setdefault(tuple(sorted(kinds.items())), []).append(name)
    for pairs, classes in alike.items():
        blocks: dict[str, list[int]] = {}
        for block, kind in pairs:
            blocks.setdefault(kind, []).append(block)
        order = sorted(blocks, key=lambda kind: (len(blocks[kind]), blocks[kind]))
        for kind in order:
            yield _Part(tuple(classes), kind, tuple(blocks[kind]), rest=kind == order[-1])


def _rule(part: _Part) -> Rule:
    names = [re.escape(c).replace(r"\-", "-") for c in part.classes]
    which = names[0] if len(names) == 1 else f"({'|'.join(names)})"
    count = len(part.blocks)
    if part.blocks == (-1,):
        return Rule(rf"{which}\.weight", part.type, f"Allocated: {', '.join(part.classes)}.")
    where = r"\d+" if part.rest else format_block_pattern(part.blocks)
    said = (
        ("the other blocks" if part.rest else f"{count} block{'s' * (count > 1)}")
        if not part.rest or count
        else ""
    )
    return Rule(
        rf"blk\.{where}\.{which}\.weight",
        part.type,
        f"Allocated: {', '.join(part.classes)} of {said}.",
    )
