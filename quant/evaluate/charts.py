"""Pictures of a release in SVG: KLD against size, bits by layer and class, error by class, KLD by domain.

Pure: what a manifest says in. Drawn here and not by a plotting library, whose fonts and versions would change the bytes. They
follow the reader's colours: light or dark, as the browser says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from quant.evaluate.pareto import lower_hull
from quant.llama.tensors import is_matrix, tensor_class
from quant.llama.types import TYPES

STYLE = """<style>
svg {
  font: 13px system-ui, sans-serif; background: var(--paper); --paper: #ffffff;
  --ink: #1f2328; --faint: #d0d7de; --dot: #0969da; --other: #bc4c00;
}
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #e6edf3; --faint: #30363d; --dot: #58a6ff; --other: #f0883e; }
}
text { fill: var(--ink); }
.grid { stroke: var(--faint); } .hull { stroke: var(--dot); fill: none; stroke-dasharray: 5 4; opacity: 0.7; }
.range { stroke: var(--dot); opacity: 0.5; } .dot { fill: var(--dot); } .peer { fill: var(--other); }
.peer-range { stroke: var(--other); opacity: 0.5; } .title { font-size: 15px; font-weight: 600; } .small { font-size: 11px; }
.label { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
</style>"""
WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 110, 44, 50
LABEL = 15
"""Height of a label."""
CELL, GUTTER = 26, 180
SCALE = (
    (1.5, "#b2182b"),
    (2.0, "#d6604d"),
    (3.0, "#f4a582"),
    (4.0, "#fddbc7"),
    (5.0, "#d1e5f0"),
    (7.0, "#92c5de"),
    (9.0, "#4393c3"),
    (99.0, "#2166ac"),
)
"""Up to so many bits, a colour; readable by those who see no red or no green."""


@dataclass(frozen=True)
class Point:
    """A file in the picture of KLD against size."""

    name: str
    bytes: int
    kld: float
    low: float
    high: float
    peer: bool = False
    """A file to compare with, not one of the release."""


def draw_kld_by_size(points: Sequence[Point], title: str) -> str:
    """Every file by its size and its KLD (logarithmic), with intervals; the line is the lower hull of all of them."""
    drawn = [p for p in points if p.kld > 0]
    if not drawn:
        return ""
    sizes, values = (
        [p.bytes for p in drawn],
        [v for p in drawn for v in (max(p.low, p.kld / 10), p.high)],
    )
    pad = max((max(sizes) - min(sizes)) * 0.05, max(sizes) * 0.01)
    x0, x1 = min(sizes) - pad, max(sizes) + pad
    y0, y1 = log10(min(values)) - 0.05, log10(max(values)) + 0.05

    def x(size: float) -> float:
        return LEFT + (size - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y(kld: float) -> float:
        return TOP + (y1 - log10(kld)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>']
    for tick in _decades(10**y0, 10**y1):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
        )
    unit, factor = next(
        (u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if max(sizes) >= f
    )
    for size in _steps(x0 / factor, x1 / factor):
        at = x(size * factor)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{size:.6g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">size, {unit}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">mean KLD from BF16, nats</text>'
    )
    line = " ".join(
        f"{x(a):.1f},{y(10**b):.1f}"
        for a, b in lower_hull([(p.bytes, log10(p.kld)) for p in drawn])
    )
    parts.append(f'<polyline class="hull" points="{line}"/>')
    taken = [(x(p.bytes) - 6, y(p.kld) + 4, 12.0) for p in drawn]
    labels: list[str] = []
    for p in sorted(drawn, key=lambda p: p.bytes):
        px, py, kind = x(p.bytes), y(p.kld), "peer" if p.peer else "dot"
        low, high = y(max(p.low, 10**y0)), y(p.high)
        ranged = "peer-range" if p.peer else "range"
        parts.append(
            f'<line class="{ranged}" x1="{px:.1f}" x2="{px:.1f}" y1="{high:.1f}" y2="{low:.1f}"/>'
        )
        mark = (
            f'<path class="peer" d="M{px:.1f} {py - 6:.1f}l6 6l-6 6l-6 -6z">'
            if p.peer
            else f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="5">'
        )
        about = f"{p.name}: {p.bytes:,} bytes, KLD {p.kld:.3g} ({p.low:.3g} to {p.high:.3g})"
        parts.append(f"{mark}<title>{escape(about)}</title></{'path' if p.peer else 'circle'}>")
        ly = _free(px + 9, py + 4, 7.2 * len(p.name), taken)
        labels.append(
            f'<text class="small label" x="{px + 9:.1f}" y="{ly:.1f}">{escape(p.name)}</text>'
        )
    parts += labels  # above all lines
    return _svg(WIDTH, HEIGHT, parts)


def draw_bits(variants: Mapping[str, Mapping[str, str]], title: str) -> str:
    """Bits per weight by class of tensor, a column a variant, each cell cut into the layers of the class from left to right.

    ``variants`` has the type of every tensor.
    """
    classes = list(
        dict.fromkeys(
            tensor_class(name)
            for tensors in variants.values()
            for name in tensors
            if is_matrix(name)
        )
    )
    wide = max(CELL * 3, 12 + ceil(6.6 * max(map(len, variants))))
    top = 74
    width, height = GUTTER + wide * len(variants) + 20, top + CELL * len(classes) + 56
    parts = [f'<text class="title" x="12" y="24">{escape(title)}</text>']
    for column, (variant, tensors) in enumerate(variants.items()):
        left = GUTTER + column * wide
        parts.append(
            f'<text class="small" x="{left + wide / 2 - 2}" y="{top - 8}" text-anchor="middle">{escape(variant)}</text>'
        )
        for row, kind in enumerate(classes):
            held = [(n, t) for n, t in tensors.items() if tensor_class(n) == kind and is_matrix(n)]
            parts += _cells(held, variant, left, top + row * CELL, wide - 4)
    for row, kind in enumerate(classes):
        parts.append(
            f'<text x="{GUTTER - 8}" y="{top + row * CELL + 17}" text-anchor="end">{escape(kind)}</text>'
        )
    parts += _legend(top + CELL * len(classes) + 18)
    return _svg(max(width, GUTTER + 90 * len(SCALE)), height, parts)


def draw_errors(variants: Mapping[str, Mapping[str, float]], title: str) -> str:
    """What each class of tensors lost in each variant, as a number on a ground that is the stronger the more it is.

    ``variants`` has the relative error of every class; a class that no variant changed is left out.
    """
    losses = [e for told in variants.values() for e in told.values() if e > 0]
    if not losses:
        return ""
    least, most = log10(min(losses)), log10(max(losses))
    classes = [
        kind
        for kind in dict.fromkeys(k for told in variants.values() for k in told)
        if any(told.get(kind) for told in variants.values())
    ]
    wide, top = max(CELL * 3, 12 + ceil(6.6 * max(map(len, variants)))), 74
    parts = [f'<text class="title" x="12" y="24">{escape(title)}</text>']
    for row, kind in enumerate(classes):
        parts.append(
            f'<text x="{GUTTER - 8}" y="{top + row * CELL + 17}" text-anchor="end">{escape(kind)}</text>'
        )
    for column, (variant, told) in enumerate(variants.items()):
        left = GUTTER + column * wide
        middle = left + wide / 2 - 2
        parts.append(
            f'<text class="small" x="{middle}" y="{top - 8}" text-anchor="middle">{escape(variant)}</text>'
        )
        for row, kind in enumerate(classes):
            error, y = told.get(kind, 0.0), top + row * CELL
            strength = (
                0.08 + 0.52 * (log10(error) - least) / max(most - least, 1e-9) if error > 0 else 0
            )
            parts.append(
                f'<rect class="peer" x="{left}" y="{y}" width="{wide - 4}" height="{CELL - 3}" fill-opacity="{strength:.2f}">'
                f"<title>{escape(f'{variant}, {kind}: {error:.3g}')}</title></rect>"
            )
            parts.append(
                f'<text class="small" x="{middle}" y="{y + 16}" text-anchor="middle">{error:.3g}</text>'
            )
    return _svg(GUTTER + wide * len(variants) + 20, top + CELL * len(classes) + 16, parts)


def draw_kld_by_domain(figures: Mapping[str, Mapping[str, float]], title: str) -> str:
    """KLD of every file in every domain, as bars beside each other (logarithmic)."""
    values = [v for domains in figures.values() for v in domains.values() if v > 0]
    if not values:
        return ""
    y0, y1 = floor(log10(min(values)) * 2) / 2 - 0.1, ceil(log10(max(values)) * 10) / 10
    domains = list(dict.fromkeys(name for told in figures.values() for name in told))
    colours = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#cf222e", "#57606a")
    room = (WIDTH - LEFT - 20) / max(len(figures), 1)
    bar = room * 0.8 / max(len(domains), 1)

    def y(kld: float) -> float:
        return TOP + 24 + (y1 - max(log10(kld), y0)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM - 24)

    parts = [f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>']
    for tick in _decades(10**y0, 10**y1):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
        )
    for n, (file, told) in enumerate(figures.items()):
        left = LEFT + n * room
        for k, domain in enumerate(domains):
            if (kld := told.get(domain, 0)) > 0:
                at, wide = y(kld), max(bar - 1, 1)
                high = max(HEIGHT - BOTTOM - at, 1)
                parts.append(
                    f'<rect x="{left + room * 0.1 + k * bar:.1f}" y="{at:.1f}" width="{wide:.1f}" height="{high:.1f}"'
                    f' fill="{colours[k % len(colours)]}"><title>{escape(file)}, {escape(domain)}: {kld:.3g}</title></rect>'
                )
        parts.append(
            f'<text class="small" x="{left + room / 2:.1f}" y="{HEIGHT - BOTTOM + (16 if n % 2 == 0 else 32)}"'
            f' text-anchor="middle">{escape(file)}</text>'
        )
    for k, domain in enumerate(domains):
        at = LEFT + 130 * k
        parts.append(
            f'<rect x="{at}" y="36" width="11" height="11" fill="{colours[k % len(colours)]}"/>'
        )
        parts.append(f'<text class="small" x="{at + 16}" y="46">{escape(domain)}</text>')
    return _svg(WIDTH, HEIGHT, parts)


def _cells(
    held: Sequence[tuple[str, str]], variant: str, left: float, y: float, wide: float
) -> Iterator[str]:
    step = wide / max(len(held), 1)
    for n, (name, kind) in enumerate(held):
        told = f"{variant}, {name}: {kind}, {TYPES[kind].bits_per_weight:.4g} bits"
        yield (
            f'<rect x="{left + n * step:.2f}" y="{y}" width="{step + 0.2:.2f}" height="{CELL - 3}"'
            f' fill="{_colour(TYPES[kind].bits_per_weight)}"><title>{escape(told)}</title></rect>'
        )


def _legend(y: float) -> Iterator[str]:
    before = 0.0
    for n, (most, colour) in enumerate(SCALE):
        said = f"{before:g} to {most:g}" if most < 99 else f"over {before:g}"
        yield f'<rect x="{12 + n * 90}" y="{y}" width="14" height="14" fill="{colour}"/>'
        yield f'<text class="small" x="{30 + n * 90}" y="{y + 11}">{said} bits</text>'
        before = most


def _colour(bits_per_weight: float) -> str:
    return next(colour for most, colour in SCALE if bits_per_weight <= most)


def _free(x: float, y: float, width: float, taken: list[tuple[float, float, float]]) -> float:
    """Where a label stands without lying on another: at its point, or as little as possible above or below."""
    at = y
    for n in range(40):
        at = y + (-1) ** n * ceil(n / 2) * LABEL / 2
        if all(
            abs(at - ty) >= LABEL - 2 or x >= tx + tw or x + width <= tx for tx, ty, tw in taken
        ):
            break
    taken.append((x, at, width))
    return at


def _decades(low: float, high: float) -> Iterator[float]:
    for power in range(floor(log10(low)), ceil(log10(high)) + 1):
        for lead in (1, 2, 5):
            if low <= (tick := float(f"{lead}e{power}")) <= high:
                yield tick


def _steps(low: float, high: float) -> Iterator[float]:
    rough = (high - low) / 6
    base = 10 ** floor(log10(rough))
    step: float = next(s * base for s in (1, 2, 5, 10) if s * base >= rough)
    n = ceil(low / step)
    while n * step <= high:
        yield n * step
        n += 1


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"
