"""Format SVG elements and documents. Pure.

Charts are drawn by hand and not by a plotting library: the same input gives the same bytes on every
machine, and no font or library version changes them. What a chart looks like is decided by its
module; this one has elements, attributes and escaping only.
"""

from collections.abc import Iterable, Sequence
from html import escape

Color = Sequence[int]
"""Red, green and blue, each from 0 to 255."""


def format_element(
    name: str, content: str = "", /, *, title: object = "", **attributes: object
) -> str:
    """Return an SVG element.

    Args:
        name: The element's name, such as ``rect``.
        content: Text inside the element. It is escaped.
        title: Tooltip of the element. It is escaped.
        attributes: Attributes in their order. An underscore stands for a hyphen and is dropped at
            the end of a name: ``text_anchor="end"``, ``class_="grid"``. None leaves one out.

    Example:
        >>> format_element("rect", x=1, fill="#ffffff")
        '<rect x="1" fill="#ffffff"/>'
        >>> format_element("text", "a < b", text_anchor="end")
        '<text text-anchor="end">a &lt; b</text>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = (f"<title>{escape(str(title))}</title>" if title else "") + escape(content)
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def format_svg(
    width: float, height: float, parts: Iterable[str], style: str = "", **attributes: object
) -> str:
    """Return a whole SVG document.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        parts: Elements, back to front.
        style: A ``<style>`` element, or nothing.
        attributes: Further attributes of ``<svg>``, as in :func:`format_element`.
    """
    size = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width:g} {height:g}",
        "width": f"{width:g}",
        "height": f"{height:g}",
    }
    head = format_element("svg", **size, **attributes).removesuffix("/>") + ">"
    return "\n".join([head, *([style] if style else []), *parts, "</svg>"]) + "\n"


def blend_colors(low: Color, high: Color, fraction: float) -> str:
    """Return the color ``fraction`` of the way from ``low`` to ``high``, as ``#rrggbb``.

    Example:
        >>> blend_colors((0, 0, 0), (255, 255, 255), 0.5)
        '#808080'
    """
    return "#" + "".join(
        f"{round(a + (b - a) * fraction):02x}" for a, b in zip(low, high, strict=True)
    )
