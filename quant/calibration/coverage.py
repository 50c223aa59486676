"""What an importance matrix has seen: tokens by expert, who was missed, and a picture of it. Pure.

A matrix of experts is known as badly as its least visited expert: rows of an expert that saw no token are quantised as if
all their columns mattered alike. Blocks behind the trunk (MTP) take no part in reading, so no calibration reaches them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.core.svg import blend_colors, format_element, format_svg
from quant.llama.tensors import split_block

CELL, GUTTER, LINE = 10, 46, 14
"""Of the picture, in pixels."""
UNVISITED_COLOR, DARK, LIGHT = "#d62728", (8, 48, 107), (247, 251, 255)
SHOWN = 8
"""Numbers of experts that one line tells."""

Counts = Mapping[str, Sequence[int]]
"""Tokens that each expert of a matrix saw, by the matrix's name; one number for a matrix without experts."""


@dataclass(frozen=True)
class Coverage:
    """How well one matrix is known."""

    tensor: str
    tokens: tuple[int, ...]
    """By expert."""

    @property
    def least(self) -> int:
        """Tokens of the expert that saw the fewest."""
        return min(self.tokens)

    @property
    def quartiles(self) -> tuple[int, int, int]:
        """A quarter, half and three quarters of the experts saw at most so many."""
        ranked = sorted(self.tokens)
        q1, q2, q3 = (ranked[max(math.ceil(len(ranked) * n / 4) - 1, 0)] for n in (1, 2, 3))
        return q1, q2, q3

    @property
    def unvisited(self) -> tuple[int, ...]:
        """Experts that saw no token."""
        return self.below(1)

    def below(self, tokens: int) -> tuple[int, ...]:
        """Experts that saw fewer tokens than that."""
        return tuple(n for n, seen in enumerate(self.tokens) if seen < tokens)


def expert_coverage(counts: Counts) -> tuple[Coverage, ...]:
    """The matrices that have experts, block by block."""
    found = [Coverage(name, tuple(tokens)) for name, tokens in counts.items() if len(tokens) > 1]
    return tuple(sorted(found, key=lambda c: parse_tensor_name(c.tensor)))


def parse_tensor_name(tensor: str) -> tuple[int, str]:
    """Block and kind of a matrix; -1 for one outside the blocks."""
    block, rest = split_block(tensor)
    return (-1, tensor) if block is None else (block, rest.removesuffix(".weight"))


def find_weak(counts: Counts, tokens: int) -> dict[str, str]:
    """For every matrix with an expert that saw fewer tokens than that, in words which experts they are.

    A matrix without experts is weak when it saw so few itself.
    """
    doubtful = (
        Coverage(name, tuple(counts[name])) for name in sorted(counts, key=parse_tensor_name)
    )
    return {c.tensor: describe_weak(c, tokens) for c in doubtful if c.below(tokens)}


def describe_weak(coverage: Coverage, tokens: int) -> str:
    """Which experts of which layer saw fewer tokens than that."""
    if len(coverage.tokens) == 1:
        return f"layer {parse_tensor_name(coverage.tensor)[0]}: saw {coverage.least} tokens, expected {tokens}"
    experts = coverage.below(tokens)
    listed = ", ".join(f"{n} ({coverage.tokens[n]})" for n in experts[:SHOWN])
    more = f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else ""
    layer = parse_tensor_name(coverage.tensor)[0]
    return (
        f"layer {layer}: expected {tokens} tokens for every expert, found fewer for {listed}{more}"
    )


def count_missed(counts: Counts, tokens: int = 1) -> Iterator[str]:
    """A line for each layer with experts that saw fewer tokens than that; matrices that saw the same are told once."""
    told: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for c in expert_coverage(counts):
        if c.below(tokens):
            told.setdefault((parse_tensor_name(c.tensor)[0], c.tokens), []).append(c.tensor)
    for names in told.values():
        c = Coverage(names[0], tuple(counts[names[0]]))
        yield f"{describe_weak(c, tokens)}; {', '.join(parse_tensor_name(name)[1] for name in names)}"


def summarize(counts: Counts) -> dict[str, Any]:
    """The whole in a few numbers, as plain JSON: for a manifest."""
    experts = expert_coverage(counts)
    return {
        "matrices": len(counts),
        "matrices_with_experts": len(experts),
        "least_tokens": min((min(t) for t in counts.values()), default=0),
        "unvisited": {c.tensor: list(c.unvisited) for c in experts if c.unvisited},
    }


def list_rows(counts: Counts) -> tuple[tuple[str, ...], ...]:
    """For a table: matrices, experts, unvisited, least, quartiles, most. Matrices that saw the same share a line."""
    told: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name in sorted(counts, key=parse_tensor_name):
        told.setdefault((parse_tensor_name(name)[0], tuple(counts[name])), []).append(
            parse_tensor_name(name)[1]
        )
    table = []
    for (block, tokens), kinds in told.items():
        c = Coverage("", tokens)
        numbers = (c.least, *c.quartiles, max(tokens))
        experts = str(len(tokens)) if len(tokens) > 1 else "-"
        table.append(
            (
                str(block) if block >= 0 else "-",
                ", ".join(kinds),
                experts,
                str(len(c.unvisited) if len(tokens) > 1 else "-"),
                *(f"{n:,}" for n in numbers),
            )
        )
    return tuple(table)


def draw_heat_map(counts: Counts, title: str) -> str:
    """Return an SVG heat map: a row per layer, a column per expert, darker for more tokens.

    The scale is logarithmic, and an expert without tokens is red. Of the matrices of a layer, the
    one that saw the fewest tokens is drawn.
    """
    layers: dict[int, Coverage] = {}
    for c in expert_coverage(counts):
        block = parse_tensor_name(c.tensor)[0]
        if block not in layers or sum(c.tokens) < sum(layers[block].tokens):
            layers[block] = c
    most = max((max(c.tokens) for c in layers.values()), default=1)
    columns = max((len(c.tokens) for c in layers.values()), default=1)
    cell = CELL * (3 if columns <= 16 else 1)
    width, top = max(GUTTER + columns * cell + 10, 520), 3 * LINE
    height = top + len(layers) * cell + 4 * LINE
    parts = [
        format_element("rect", width=width, height=height, fill="#ffffff"),
        format_element("text", title, x=GUTTER, y=LINE, font_size=12),
        format_element("text", "layer", x=GUTTER - 4, y=top - 4, text_anchor="end"),
        format_element("text", f"expert 0 to {columns - 1}", x=GUTTER, y=top - 4),
    ]
    for row, (block, c) in enumerate(sorted(layers.items())):
        y = top + row * cell
        if cell > CELL or row % 2 == 0:  # a label is higher than a small cell
            at = {"x": GUTTER - 4, "y": f"{y + cell / 2 + 4:g}"}
            parts.append(format_element("text", str(block), **at, text_anchor="end"))
        parts += (
            format_element(
                "rect",
                title=f"layer {block}, expert {n}: {tokens:,} tokens",
                x=GUTTER + n * cell,
                y=y,
                width=cell,
                height=cell,
                fill=_choose_color(tokens, most),
            )
            for n, tokens in enumerate(c.tokens)
        )
    parts += _draw_legend(most, top + len(layers) * cell + LINE)
    return format_svg(width, height, parts, font_family="sans-serif", font_size=10)


def _draw_legend(most: int, y: int) -> Iterator[str]:
    """Yield swatches for no token, for the powers of ten, and for the most tokens."""
    marks = [0, *(10**n for n in range(len(str(most)))), most]
    x = GUTTER
    for tokens in dict.fromkeys(marks):
        box = {"x": x, "y": y, "width": CELL, "height": CELL}
        fill = _choose_color(tokens, most)
        yield format_element("rect", **box, fill=fill, stroke="#999999")
        yield format_element("text", f"{tokens:,}", x=x + CELL + 3, y=y + CELL - 1)
        x += CELL + 12 + 7 * len(f"{tokens:,}")
    yield format_element("text", "tokens", x=x, y=y + CELL - 1)


def _choose_color(tokens: int, most: int) -> str:
    if not tokens:
        return UNVISITED_COLOR
    return blend_colors(LIGHT, DARK, math.log1p(tokens) / math.log1p(most))
