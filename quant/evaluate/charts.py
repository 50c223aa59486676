"""Charts of KLD in SVG, against size and by domain, and what all charts share. Pure.

They are drawn by hand, with :mod:`quant.core.svg`, and not by a plotting library. A rebuild
compares them byte by byte, and a library's version, or the fonts that are installed, would change
the bytes. Colors follow the reader's light or dark mode.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from quant.core.svg import format_element, format_svg
from quant.evaluate.pareto import lower_hull

STYLE = """<style>
svg {
  font: 13px system-ui, sans-serif; background: var(--paper); --paper: #ffffff;
  --ink: #1f2328; --faint: #d0d7de; --dot: #0969da; --other: #bc4c00;
}
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #e6edf3; --faint: #30363d; --dot: #58a6ff; --other: #f0883e; }
}
text { fill: var(--ink); }
.grid { stroke: var(--faint); } .hull { stroke: var(--dot); fill: none; \
stroke-dasharray: 5 4; opacity: 0.7; }
.range { stroke: var(--dot); opacity: 0.5; } .dot { fill: var(--dot); } \
.peer { fill: var(--other); }
.peer-range { stroke: var(--other); opacity: 0.5; } .title { font-size: 15px; font-weight: 600; } \
.small { font-size: 11px; }
.label { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
</style>"""
WIDTH, HEIGHT = 860, 480
"""Of charts with axes, in pixels as all lengths here."""
LEFT, RIGHT, TOP, BOTTOM = 70, 110, 44, 50
"""Margins of charts with axes."""
LABEL_HEIGHT = 15
LETTER_WIDTH = 7.2
"""Estimated generously: text cannot be measured without a font."""
DOMAIN_COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#cf222e", "#57606a")
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1))


@dataclass(frozen=True)
class Point:
    """A file in the chart of KLD against size."""

    name: str
    bytes: int
    kld: float
    """Mean KLD, in nats."""
    low: float
    high: float
    """Ends of its 95 % interval."""
    peer: bool = False
    """Whether it is only to compare with."""


@dataclass(frozen=True)
class Axis:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw_kld_by_size(points: Sequence[Point], title: str) -> str:
    """Return a chart of files by size and KLD (logarithmic), with intervals.

    Nothing if no KLD is above 0.
    The dashed line is the lower hull of all files. A file above it is worse than a mixture of its
    neighbors.
    """
    shown = [p for p in points if p.kld > 0]
    if not shown:
        return ""
    sizes = [p.bytes for p in shown]
    # An interval that reaches down to 0 has no place on a logarithmic axis: it is cut at a tenth.
    values = [v for p in shown for v in (max(p.low, p.kld / 10), p.high)]
    # Room at both ends, so that no mark lies on the frame; also if all sizes are the same.
    pad = max((max(sizes) - min(sizes)) * 0.05, max(sizes) * 0.01)
    x = Axis(min(sizes) - pad, max(sizes) + pad, LEFT, WIDTH - RIGHT)
    y = Axis(log10(max(values)) + 0.05, log10(min(values)) - 0.05, TOP, HEIGHT - BOTTOM)
    parts = [
        draw_title(title, LEFT),
        *_draw_kld_grid(y, WIDTH - RIGHT),
        *_draw_size_grid(x, max(sizes)),
    ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        format_element(
            "text",
            "mean KLD from BF16, nats",
            transform=f"translate(16 {middle}) rotate(-90)",
            text_anchor="middle",
        )
    )
    # The hull of the logarithms, because that is the axis: a straight line between two files is a
    # geometric mean of their KLDs.
    hull = lower_hull([(p.bytes, log10(p.kld)) for p in shown])
    line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in hull)
    parts.append(format_element("polyline", class_="hull", points=line))
    boxes = [(x.at(p.bytes) - 6, y.at(log10(p.kld)) + 4, 12.0) for p in shown]
    labels: list[str] = []
    for p in sorted(shown, key=lambda p: p.bytes):
        px, py = x.at(p.bytes), y.at(log10(p.kld))
        parts += _draw_point(p, px, py, y)
        label_y = _find_free(px + 9, py + 4, LETTER_WIDTH * len(p.name), boxes)
        labels.append(
            format_element(
                "text", p.name, class_="small label", x=f"{px + 9:.1f}", y=f"{label_y:.1f}"
            )
        )
    return format_svg(WIDTH, HEIGHT, [*parts, *labels], STYLE)  # labels above all lines


def draw_kld_by_domain(figures: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Return a chart with a bar for the KLD of each file in each domain (logarithmic).

    Args:
        figures: By file, the mean KLD in each domain.
        title: Of the chart.

    Returns:
        The SVG; nothing if no KLD is above 0.
    """
    values = [v for domains in figures.values() for v in domains.values() if v > 0]
    if not values:
        return ""
    lowest = floor(log10(min(values)) * 2) / 2 - 0.1
    y = Axis(ceil(log10(max(values)) * 10) / 10, lowest, TOP + 24, HEIGHT - BOTTOM)
    domains = list(dict.fromkeys(name for by_domain in figures.values() for name in by_domain))
    colors = {d: DOMAIN_COLORS[n % len(DOMAIN_COLORS)] for n, d in enumerate(domains)}
    group = (WIDTH - LEFT - 20) / max(len(figures), 1)
    bar = group * 0.8 / max(len(domains), 1)
    parts = [draw_title(title, LEFT), *_draw_kld_grid(y, WIDTH - 20)]
    for n, (file, by_domain) in enumerate(figures.items()):
        left = LEFT + n * group
        for k, domain in enumerate(domains):
            if (kld := by_domain.get(domain, 0)) > 0:
                top = y.at(max(log10(kld), lowest))
                parts.append(
                    format_element(
                        "rect",
                        title=f"{file}, {domain}: {kld:.3g}",
                        x=f"{left + group * 0.1 + k * bar:.1f}",
                        y=f"{top:.1f}",
                        width=f"{max(bar - 1, 1):.1f}",
                        height=f"{max(HEIGHT - BOTTOM - top, 1):.1f}",
                        fill=colors[domain],
                    )
                )
        # In two lines by turns, so that long names stand apart.
        label_y = HEIGHT - BOTTOM + (16 if n % 2 == 0 else 32)
        parts.append(draw_small(file, f"{left + group / 2:.1f}", label_y))
    for k, (domain, color) in enumerate(colors.items()):
        x = LEFT + 130 * k
        parts.append(format_element("rect", x=x, y=36, width=11, height=11, fill=color))
        parts.append(format_element("text", domain, class_="small", x=x + 16, y=46))
    return format_svg(WIDTH, HEIGHT, parts, STYLE)


def draw_title(title: str, x: float = 12) -> str:
    """Return a chart's title, which begins at x."""
    return format_element("text", title, class_="title", x=x, y=24)


def draw_small(text: str, x: object, y: float) -> str:
    """Return small text around x."""
    return format_element("text", text, class_="small", x=x, y=y, text_anchor="middle")


def _draw_kld_grid(y: Axis, right: float) -> Iterator[str]:
    """Yield a line for each 1, 2 and 5 of a logarithmic axis, whose ``low`` is its upper end."""
    for tick in _list_log_ticks(10**y.high, 10**y.low):
        at = y.at(log10(tick))
        yield format_element(
            "line", class_="grid", x1=LEFT, x2=right, y1=f"{at:.1f}", y2=f"{at:.1f}"
        )
        yield format_element(
            "text", f"{tick:.6g}", x=LEFT - 8, y=f"{at + 4:.1f}", text_anchor="end"
        )


def _draw_size_grid(x: Axis, largest: float) -> Iterator[str]:
    unit, factor = next((u, f) for u, f in UNITS if largest >= f)
    bottom = HEIGHT - BOTTOM
    for size in _list_ticks(x.low / factor, x.high / factor):
        at = f"{x.at(size * factor):.1f}"
        yield format_element("line", class_="grid", x1=at, x2=at, y1=TOP, y2=bottom)
        yield format_element("text", f"{size:.6g}", x=at, y=bottom + 18, text_anchor="middle")
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield format_element("text", f"size, {unit}", x=middle, y=HEIGHT - 10, text_anchor="middle")


def _draw_point(point: Point, x: float, y: float, axis: Axis) -> Iterator[str]:
    """Yield a file's interval and its mark: a circle, or a diamond for a peer."""
    # The vertical axis points down: `high` is the smallest KLD, at the lower frame. There an
    # interval ends that reaches down to 0.
    ends = {
        "y1": f"{axis.at(log10(point.high)):.1f}",
        "y2": f"{axis.at(log10(max(point.low, 10**axis.high))):.1f}",
    }
    kind = "peer-range" if point.peer else "range"
    yield format_element("line", class_=kind, x1=f"{x:.1f}", x2=f"{x:.1f}", **ends)
    tip = (
        f"{point.name}: {point.bytes:,} bytes,"
        f" KLD {point.kld:.3g} ({point.low:.3g} to {point.high:.3g})"
    )
    if point.peer:
        diamond = f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"
        yield format_element("path", title=tip, class_="peer", d=diamond)
    else:
        yield format_element("circle", title=tip, class_="dot", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5)


def _find_free(x: float, y: float, width: float, boxes: list[tuple[float, float, float]]) -> float:
    """Return where a label overlaps no other, as close to its point as possible, and take it.

    It alternates: half a line below, half a line above, a line below, and so on.
    """
    at = y
    for n in range(40):
        at = y + (-1) ** n * ceil(n / 2) * LABEL_HEIGHT / 2
        if all(
            abs(at - ty) >= LABEL_HEIGHT - 2 or x >= tx + tw or x + width <= tx
            for tx, ty, tw in boxes
        ):
            break
    boxes.append((x, at, width))
    return at


def _list_log_ticks(low: float, high: float) -> Iterator[float]:
    for power in range(floor(log10(low)), ceil(log10(high)) + 1):
        for lead in (1, 2, 5):
            # Parsed, not computed: 5 * 10.0**-6 is not 5e-06.
            if low <= (tick := float(f"{lead}e{power}")) <= high:
                yield tick


def _list_ticks(low: float, high: float) -> Iterator[float]:
    """Yield about six round numbers."""
    rough = (high - low) / 6
    base = 10 ** floor(log10(rough))
    step: float = next(s * base for s in (1, 2, 5, 10) if s * base >= rough)
    n = ceil(low / step)
    # A product, not a running sum, whose rounding errors would show in the labels.
    while n * step <= high:
        yield n * step
        n += 1
