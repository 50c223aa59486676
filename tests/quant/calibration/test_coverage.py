"""Coverage: tokens by expert as numbers, as lines, and as a heat map."""

import re
import xml.etree.ElementTree as ET

from quant.calibration.coverage import (
    Coverage,
    draw_heat_map,
    find_undercovered,
    list_expert_coverage,
    list_undercovered,
    make_table_rows,
    summarize_coverage,
)

COUNTS = {
    "blk.10.ffn_up_exps.weight": (5, 0, 40, 8),
    "blk.2.ffn_up_exps.weight": (50, 60, 70, 80),
    "blk.2.attn_q.weight": (200,),
    "blk.10.ffn_gate_exps.weight": (5, 0, 40, 8),
    "output.weight": (3,),
}


def test_quartiles_are_numbers_of_experts() -> None:
    assert Coverage("a", tuple(range(1, 9))).quartiles == (2, 4, 6)
    assert Coverage("a", (7,)).quartiles == (7, 7, 7)
    assert Coverage("a", (1, 100, 3)).quartiles == (1, 3, 100)


def test_matrices_with_experts_are_sorted_by_layer() -> None:
    assert [c.tensor for c in list_expert_coverage(COUNTS)] == [
        "blk.2.ffn_up_exps.weight",
        "blk.10.ffn_gate_exps.weight",
        "blk.10.ffn_up_exps.weight",
    ]
    assert list_expert_coverage(COUNTS)[1].unvisited == (1,)


def test_a_layer_has_one_line_that_lists_its_matrices_and_experts_with_their_tokens() -> None:
    assert list(list_undercovered(COUNTS, 8)) == [
        "layer 10: expected 8 tokens for every expert, found fewer for 0 (5), 1 (0); ffn_gate_exps, ffn_up_exps"
    ]
    assert list(list_undercovered(COUNTS)) == [
        "layer 10: expected 1 tokens for every expert, found fewer for 1 (0); ffn_gate_exps, ffn_up_exps"
    ]
    assert list(list_undercovered(COUNTS, 0)) == []


def test_a_line_lists_at_most_eight_experts() -> None:
    [line] = list_undercovered({"blk.0.ffn_up_exps.weight": (0,) * 20})
    assert "0 (0), 1 (0)" in line and "and 12 more" in line


def test_an_undercovered_matrix_has_a_reason() -> None:
    assert list(find_undercovered(COUNTS, 41)) == [
        "output.weight",
        "blk.10.ffn_gate_exps.weight",
        "blk.10.ffn_up_exps.weight",
    ]
    assert find_undercovered(COUNTS, 4) == {
        "output.weight": "layer -1: saw 3 tokens, expected 4",
        "blk.10.ffn_gate_exps.weight": "layer 10: expected 4 tokens for every expert, found fewer for 1 (0)",
        "blk.10.ffn_up_exps.weight": "layer 10: expected 4 tokens for every expert, found fewer for 1 (0)",
    }
    assert find_undercovered(COUNTS, 0) == {}


def test_the_summary_is_plain_numbers() -> None:
    assert summarize_coverage(COUNTS) == {
        "matrices": 5,
        "matrices_with_experts": 3,
        "least_tokens": 0,
        "unvisited": {"blk.10.ffn_gate_exps.weight": [1], "blk.10.ffn_up_exps.weight": [1]},
    }
    assert summarize_coverage({})["least_tokens"] == 0


def test_matrices_with_the_same_counts_share_a_row() -> None:
    assert make_table_rows(COUNTS) == (
        ("-", "output.weight", "-", "-", "3", "3", "3", "3", "3"),
        ("2", "attn_q", "-", "-", "200", "200", "200", "200", "200"),
        ("2", "ffn_up_exps", "4", "0", "50", "50", "60", "70", "80"),
        ("10", "ffn_gate_exps, ffn_up_exps", "4", "1", "0", "0", "5", "8", "40"),
    )


def test_the_heat_map_has_a_cell_for_each_expert_of_each_layer_and_red_for_no_token() -> None:
    svg = draw_heat_map(COUNTS, "A & B <c>")
    tree = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    cells = [r for r in tree.iter(f"{space}rect") if r.find(f"{space}title") is not None]
    fills = {str(r.findtext(f"{space}title")): r.get("fill") for r in cells}
    assert len(cells) == 8
    assert fills["layer 10, expert 1: 0 tokens"] == "#d62728"
    assert list(fills.values()).count("#d62728") == 1
    assert fills["layer 2, expert 3: 80 tokens"] == "#08306b"
    assert "A & B <c>" in [t.text for t in tree.iter(f"{space}text")]
    corners = [(r.get("x"), r.get("y")) for r in cells]
    assert len(set(corners)) == 8
    assert float(str(tree.get("width"))) >= max(float(str(x)) for x, _ in corners)
    assert re.match(r"<svg ", svg)


def test_a_model_without_experts_has_an_empty_heat_map() -> None:
    assert ET.fromstring(draw_heat_map({"blk.0.attn_q.weight": (3,)}, "x")) is not None
