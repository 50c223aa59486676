"""Fold a type for every tensor into the few rules that a person would write. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quant.llama.gguf import TensorSpec
from quant.llama.tensors import split_block, tensor_class
from quant.llama.types import FILE_TYPES
from quant.plan.recipe import Rule, Variant

OTHER_FILE_TYPE = "Q8_0"
"""File type of a variant whose commonest type has none of its own."""
NO_BLOCK = -1
"""Block number of tensors outside the blocks."""


@dataclass(frozen=True)
class _TypeRun:
    """Tensors of some classes that have one type in some blocks."""

    classes: tuple[str, ...]
    type: str
    blocks: tuple[int, ...]
    is_rest: bool
    """Whether all other blocks of these classes have this type."""


def fold_types(
    name: str, summary: str, types: Mapping[str, str], tensors: Sequence[TensorSpec]
) -> Variant:
    """Return the variant that gives tensors their types, in few rules.

    Classes with the same types in the same blocks share their rules. Of a class the rarer types
    come first and name their blocks; the commonest type takes the remaining blocks.

    Args:
        name: Name of the variant.
        summary: Its summary.
        types: Type by name, for every tensor that is quantized.
        tensors: All tensors of the model.
    """
    weights: dict[str, int] = {}
    for t in tensors:
        if t.name in types:
            weights[types[t.name]] = weights.get(types[t.name], 0) + t.elements
    commonest = max(weights, key=lambda kind: weights[kind])
    rules = tuple(_make_rule(run) for run in _split_into_runs(types))
    return Variant(name=name, summary=summary, file_type=choose_file_type(commonest), rules=rules)


def choose_file_type(commonest: str) -> str:
    """Return ``general.file_type`` of a file most of whose weights have the type ``commonest``.

    llama.cpp names mixtures of a K type by size; the mixture around Q4_K is Q4_K_M.

    Example:
        >>> choose_file_type("Q4_K"), choose_file_type("IQ2_S")
        ('Q4_K_M', 'IQ2_S')
    """
    return next((t for t in (commonest, f"{commonest}_M") if t in FILE_TYPES), OTHER_FILE_TYPE)


def format_block_pattern(blocks: Sequence[int]) -> str:
    r"""Return a regular expression for exactly these block numbers, grouped by tens.

    Example:
        >>> format_block_pattern(range(42, 61))
        '(4[2-9]|5\\d|60)'
    """
    tens: dict[int, list[int]] = {}
    for n in sorted(set(blocks)):
        tens.setdefault(n // 10, []).append(n % 10)
    # Block 7 is "7", not "07".
    parts = [f"{ten or ''}{_format_digits(digits)}" for ten, digits in tens.items()]
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _format_digits(digits: Sequence[int]) -> str:
    r"""Return a pattern for sorted digits: 7, \d, [0-3], [124]."""
    if len(digits) == 1:
        return str(digits[0])
    if len(digits) == 10:
        return r"\d"
    runs: list[list[int]] = []
    for d in digits:
        if runs and d == runs[-1][-1] + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    # "12" is shorter than "1-2".
    texts = (f"{r[0]}-{r[-1]}" if len(r) > 2 else "".join(map(str, r)) for r in runs)
    return f"[{''.join(texts)}]"


def _split_into_runs(types: Mapping[str, str]) -> Iterator[_TypeRun]:
    by_class: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        block, _ = split_block(name)
        by_class.setdefault(tensor_class(name), {})[NO_BLOCK if block is None else block] = kind
    equal: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for name, by_block in by_class.items():
        equal.setdefault(tuple(sorted(by_block.items())), []).append(name)
    for pairs, classes in equal.items():
        blocks: dict[str, list[int]] = {}
        for block, kind in pairs:
            blocks.setdefault(kind, []).append(block)
        # Equal numbers are ordered by their blocks, so that equal types give equal files.
        order = sorted(blocks, key=lambda kind: (len(blocks[kind]), blocks[kind]))
        for kind in order:
            yield _TypeRun(tuple(classes), kind, tuple(blocks[kind]), is_rest=kind == order[-1])


def _make_rule(run: _TypeRun) -> Rule:
    # re.escape also escapes "-", which only needs it within brackets.
    names = [re.escape(c).replace(r"\-", "-") for c in run.classes]
    classes = names[0] if len(names) == 1 else f"({'|'.join(names)})"
    listed = ", ".join(run.classes)
    if run.blocks == (NO_BLOCK,):
        return Rule(rf"{classes}\.weight", run.type, f"Allocated: {listed}.")
    blocks = r"\d+" if run.is_rest else format_block_pattern(run.blocks)
    count = len(run.blocks)
    where = "the other blocks" if run.is_rest else f"{count} block{'s' * (count > 1)}"
    return Rule(rf"blk\.{blocks}\.{classes}\.weight", run.type, f"Allocated: {listed} of {where}.")
