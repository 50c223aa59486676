"""Charts with a row for each tensor class and a column for each variant: bits, errors. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, log10

from quant.core.svg import format_element, format_svg
from quant.evaluate.charts import STYLE, draw_small, draw_title
from quant.llama.tensors import is_matrix, tensor_class
from quant.llama.types import TYPES

CELL, GUTTER, GRID_TOP = 26, 180, 74
"""Height of a row, width of the classes' names, and where rows begin, in pixels."""
LETTER_WIDTH = 6.6
"""Of small text, estimated generously: text cannot be measured without a font."""
BIT_COLORS = (
    (1.5, "#b2182b"),
    (2.0, "#d6604d"),
    (3.0, "#f4a582"),
    (4.0, "#fddbc7"),
    (5.0, "#d1e5f0"),
    (7.0, "#92c5de"),
    (9.0, "#4393c3"),
    (99.0, "#2166ac"),
)
"""Up to so many bits, a color: ColorBrewer's RdBu, which needs no telling red from green."""


def draw_bits(variants: Mapping[str, Mapping[str, str]], title: str) -> str:
    """Return a chart of bits per weight: a row for each tensor class, a column for each variant.

    Each cell is cut into the layers of the class, from left to right.

    Args:
        variants: By variant, the type of each tensor.
        title: Of the chart.
    """
    # A dict keeps the order of the file; a set would give another chart in each process. Norms and
    # biases have one type in all variants: rows for them would show nothing.
    classes = list(
        dict.fromkeys(
            tensor_class(name)
            for tensors in variants.values()
            for name in tensors
            if is_matrix(name)
        )
    )
    width = _choose_column_width(variants)
    parts = [draw_title(title)]
    for column, (variant, tensors) in enumerate(variants.items()):
        left = GUTTER + column * width
        parts.append(_draw_column_head(variant, left + width / 2 - 2))
        for row, kind in enumerate(classes):
            layers = {n: t for n, t in tensors.items() if tensor_class(n) == kind and is_matrix(n)}
            parts += _draw_layers(layers, variant, left, GRID_TOP + row * CELL, width - 4)
    parts += _draw_class_names(classes)
    bottom = GRID_TOP + CELL * len(classes)
    parts += _draw_bit_legend(bottom + 18)
    whole = max(GUTTER + width * len(variants) + 20, GUTTER + 90 * len(BIT_COLORS))
    return format_svg(whole, bottom + 56, parts, STYLE)


def draw_errors(variants: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Return a chart of quantization errors, by tensor class and variant.

    A cell has the number, on a ground that is stronger the larger it is (logarithmic).

    Args:
        variants: By variant, the error of each class. A class without error anywhere is left out.
        title: Of the chart.

    Returns:
        The SVG; nothing if there is no error at all.
    """
    positive = [e for errors in variants.values() for e in errors.values() if e > 0]
    if not positive:
        return ""
    ends = log10(min(positive)), log10(max(positive))
    classes = [
        kind
        for kind in dict.fromkeys(k for errors in variants.values() for k in errors)
        if any(errors.get(kind) for errors in variants.values())
    ]
    width = _choose_column_width(variants)
    parts = [draw_title(title), *_draw_class_names(classes)]
    for column, (variant, errors) in enumerate(variants.items()):
        left = GUTTER + column * width
        middle = left + width / 2 - 2
        parts.append(_draw_column_head(variant, middle))
        for row, kind in enumerate(classes):
            error, y = errors.get(kind, 0.0), GRID_TOP + row * CELL
            parts.append(
                format_element(
                    "rect",
                    title=f"{variant}, {kind}: {error:.3g}",
                    class_="peer",
                    x=left,
                    y=y,
                    width=width - 4,
                    height=CELL - 3,
                    fill_opacity=f"{_choose_opacity(error, *ends):.2f}",
                )
            )
            parts.append(draw_small(f"{error:.3g}", middle, y + 16))
    whole = GUTTER + width * len(variants) + 20
    return format_svg(whole, GRID_TOP + CELL * len(classes) + 16, parts, STYLE)


def _choose_column_width(variants: Mapping[str, object]) -> int:
    return max(CELL * 3, 12 + ceil(LETTER_WIDTH * max(map(len, variants))))


def _draw_column_head(variant: str, middle: float) -> str:
    return draw_small(variant, middle, GRID_TOP - 8)


def _draw_class_names(classes: Sequence[str]) -> Iterator[str]:
    for row, kind in enumerate(classes):
        y = GRID_TOP + row * CELL + 17
        yield format_element("text", kind, x=GUTTER - 8, y=y, text_anchor="end")


def _draw_layers(
    layers: Mapping[str, str], variant: str, left: float, y: float, width: float
) -> Iterator[str]:
    step = width / max(len(layers), 1)
    for n, (name, kind) in enumerate(layers.items()):
        bits = TYPES[kind].bits_per_weight
        yield format_element(
            "rect",
            title=f"{variant}, {name}: {kind}, {bits:.4g} bits",
            x=f"{left + n * step:.2f}",
            y=y,
            width=f"{step + 0.2:.2f}",  # without the overlap, seams show between neighbors
            height=CELL - 3,
            fill=next(color for most, color in BIT_COLORS if bits <= most),
        )


def _draw_bit_legend(y: float) -> Iterator[str]:
    before = 0.0
    for n, (most, color) in enumerate(BIT_COLORS):
        text = f"{before:g} to {most:g} bits" if most < 99 else f"over {before:g} bits"
        yield format_element("rect", x=12 + n * 90, y=y, width=14, height=14, fill=color)
        yield format_element("text", text, class_="small", x=30 + n * 90, y=y + 11)
        before = most


def _choose_opacity(error: float, least: float, most: float) -> float:
    """Return 0.08 to 0.6 for errors whose logarithms lie between two ends, and 0 for none."""
    if error <= 0:
        return 0
    # 0.08 can still be seen, and on 0.6 the number can still be read. With one error in all, both
    # ends are the same.
    return 0.08 + 0.52 * (log10(error) - least) / max(most - least, 1e-9)
