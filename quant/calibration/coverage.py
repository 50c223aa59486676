"""Coverage of an importance matrix: tokens by expert, experts with too few, a heat map. Pure.

A matrix of experts is only as good as its least visited expert: the rows of an expert without
tokens are quantized as if all of their columns mattered alike. Blocks behind the trunk (MTP) do not
run while a text is read, so no calibration text covers them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.core.svg import blend_colors, format_element, format_svg
from quant.llama.tensors import split_block

CELL, GUTTER, LINE = 10, 46, 14
"""Sizes in the heat map, in pixels."""
UNVISITED_COLOR, DARK, LIGHT = "#d62728", (8, 48, 107), (247, 251, 255)
MAX_EXPERTS = 8
"""Experts that one line lists."""

Counts = Mapping[str, Sequence[int]]
"""Tokens of each expert, by tensor name; one number for a matrix without experts."""


@dataclass(frozen=True)
class Coverage:
    """The tokens that one matrix saw."""

    tensor: str
    tokens: tuple[int, ...]
    """By expert."""

    @property
    def least(self) -> int:
        """Tokens of the expert that saw the fewest."""
        return min(self.tokens)

    @property
    def quartiles(self) -> tuple[int, int, int]:
        """Token counts that a quarter, half and three quarters of the experts do not exceed."""
        ranked = sorted(self.tokens)
        # Nearest rank, not interpolated: the result is the count of an expert.
        q1, q2, q3 = (ranked[max(math.ceil(len(ranked) * n / 4) - 1, 0)] for n in (1, 2, 3))
        return q1, q2, q3

    @property
    def unvisited(self) -> tuple[int, ...]:
        """Experts that saw no token."""
        return self.below(1)

    def below(self, tokens: int) -> tuple[int, ...]:
        """Return the experts that saw fewer tokens than that."""
        return tuple(expert for expert, count in enumerate(self.tokens) if count < tokens)


def list_expert_coverage(counts: Counts) -> tuple[Coverage, ...]:
    """Return the coverage of the matrices with experts, block by block."""
    experts = [Coverage(name, tuple(tokens)) for name, tokens in counts.items() if len(tokens) > 1]
    return tuple(sorted(experts, key=lambda c: parse_tensor_name(c.tensor)))


def parse_tensor_name(tensor: str) -> tuple[int, str]:
    """Return the block and the class of a tensor; block -1 for one outside the blocks."""
    block, rest = split_block(tensor)
    return (-1, tensor) if block is None else (block, rest.removesuffix(".weight"))


def find_undercovered(counts: Counts, tokens: int) -> dict[str, str]:
    """Find the matrices with insufficient coverage.

    Args:
        counts: Tokens by tensor and expert.
        tokens: Tokens that each expert should see, and each matrix without experts.

    Returns:
        A reason by tensor name, which lists the experts.
    """
    coverages = (
        Coverage(name, tuple(counts[name])) for name in sorted(counts, key=parse_tensor_name)
    )
    return {c.tensor: describe_undercovered(c, tokens) for c in coverages if c.below(tokens)}


def describe_undercovered(coverage: Coverage, tokens: int) -> str:
    """Return a line that lists the experts of a matrix with fewer tokens than that."""
    layer = parse_tensor_name(coverage.tensor)[0]
    if len(coverage.tokens) == 1:
        return f"layer {layer}: saw {coverage.least} tokens, expected {tokens}"
    experts = coverage.below(tokens)
    listed = ", ".join(f"{n} ({coverage.tokens[n]})" for n in experts[:MAX_EXPERTS])
    more = f" and {len(experts) - MAX_EXPERTS} more" if len(experts) > MAX_EXPERTS else ""
    return (
        f"layer {layer}: expected {tokens} tokens for every expert, found fewer for {listed}{more}"
    )


def list_undercovered(counts: Counts, tokens: int = 1) -> Iterator[str]:
    """Yield a line for each layer with experts that saw fewer tokens than that.

    Matrices of a layer with the same counts share a line: gate, up and down see the same tokens.
    """
    names = [c.tensor for c in list_expert_coverage(counts) if c.below(tokens)]
    for (block, by_expert), kinds in _group_equal(counts, names):
        line = describe_undercovered(Coverage(f"blk.{block}.{kinds[0]}", by_expert), tokens)
        yield f"{line}; {', '.join(kinds)}"


def summarize_coverage(counts: Counts) -> dict[str, Any]:
    """Return the manifest's summary, as plain JSON."""
    experts = list_expert_coverage(counts)
    return {
        "matrices": len(counts),
        "matrices_with_experts": len(experts),
        "least_tokens": min((min(t) for t in counts.values()), default=0),
        "unvisited": {c.tensor: list(c.unvisited) for c in experts if c.unvisited},
    }


def make_table_rows(counts: Counts) -> tuple[tuple[str, ...], ...]:
    """Return the rows of a table: layer, matrices, experts, unvisited, least, quartiles, most.

    Matrices of a layer with the same counts share a row.
    """
    rows = []
    for (block, tokens), kinds in _group_equal(counts, sorted(counts, key=parse_tensor_name)):
        coverage, has_experts = Coverage("", tokens), len(tokens) > 1
        numbers = (coverage.least, *coverage.quartiles, max(tokens))
        rows.append(
            (
                str(block) if block >= 0 else "-",
                ", ".join(kinds),
                str(len(tokens)) if has_experts else "-",
                str(len(coverage.unvisited)) if has_experts else "-",
                *(f"{n:,}" for n in numbers),
            )
        )
    return tuple(rows)


def _group_equal(
    counts: Counts, names: Iterable[str]
) -> Iterable[tuple[tuple[int, tuple[int, ...]], list[str]]]:
    """Group tensors by block and counts: return these with the classes of each group."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name in names:
        block, kind = parse_tensor_name(name)
        groups.setdefault((block, tuple(counts[name])), []).append(kind)
    return groups.items()


def draw_heat_map(counts: Counts, title: str) -> str:
    """Return an SVG heat map: a row per layer, a column per expert, darker for more tokens.

    The scale is logarithmic, and an expert without tokens is red. Of the matrices of a layer, the
    one that saw the fewest tokens is drawn.
    """
    layers: dict[int, Coverage] = {}
    for c in list_expert_coverage(counts):
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
        # SVG cannot measure text. 7 pixels are enough for a digit or comma of the 10-pixel font.
        x += CELL + 12 + 7 * len(f"{tokens:,}")
    yield format_element("text", "tokens", x=x, y=y + CELL - 1)


def _choose_color(tokens: int, most: int) -> str:
    if not tokens:
        return UNVISITED_COLOR
    return blend_colors(LIGHT, DARK, math.log1p(tokens) / math.log1p(most))
