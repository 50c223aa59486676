"""SVG elements: attribute names, escaping, and whole documents."""

import xml.etree.ElementTree as ET

from quant.core.svg import blend_colors, format_element, format_svg


def test_an_element_has_its_attributes_in_order_and_hyphens_for_underscores() -> None:
    assert format_element("line", x1=1, stroke_width="2", class_="grid", fill=None) == (
        '<line x1="1" stroke-width="2" class="grid"/>'
    )


def test_text_titles_and_attributes_are_escaped() -> None:
    element = ET.fromstring(format_element("text", "<a> & b", title='"x" < y', fill='"'))
    assert (element[0].text, element[0].tail, element.get("fill")) == ('"x" < y', "<a> & b", '"')


def test_a_document_has_its_size_style_and_parts() -> None:
    svg = format_svg(20, 10.5, ["<g/>"], "<style>g {}</style>", font_size=10)
    root = ET.fromstring(svg)
    assert (root.get("viewBox"), root.get("height"), root.get("font-size")) == (
        "0 0 20 10.5",
        "10.5",
        "10",
    )
    assert [part.tag.rpartition("}")[2] for part in root] == ["style", "g"]
    assert svg.endswith("</svg>\n")


def test_colors_are_blended_by_a_fraction() -> None:
    low, high = (247, 251, 255), (8, 48, 107)
    assert [blend_colors(low, high, f) for f in (0, 1)] == ["#f7fbff", "#08306b"]
