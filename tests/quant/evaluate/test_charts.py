"""Charts: well-formed, the same bytes every time, every file and tensor in them."""

from xml.etree import ElementTree

import pytest

from quant.evaluate.html import ReportFile, draw_charts
from tests.quant.evaluate.conftest import FIGURES, TENSORS, make_report_file

FILES = [
    make_report_file("UD-A", 10**9, 0.3),
    make_report_file("UD-<B>", 2 * 10**9, 0.1),
    make_report_file("Q4_K_M", 3 * 10**9, 0.2, peer=True),
]


@pytest.mark.parametrize(
    "name", ["kld-by-size.svg", "bits.svg", "error-by-class.svg", "kld-by-domain.svg"]
)
def test_a_chart_is_well_formed_and_the_same_every_time(name: str) -> None:
    _, svg = draw_charts(FILES, "GLM & more")[name]
    texts = {e.text for e in ElementTree.fromstring(svg).iter()}
    assert {"UD-A", "UD-<B>", "Q4_K_M"} <= texts
    assert svg == draw_charts(FILES, "GLM & more")[name][1]
    assert "http://www.w3.org/2000/svg" in svg and svg.count("http") == 1


def test_a_peer_has_its_own_mark_and_every_tensor_a_cell() -> None:
    charts = draw_charts(FILES, "GLM")
    size, bits = charts["kld-by-size.svg"][1], charts["bits.svg"][1]
    assert size.count('<circle class="dot"') == 2 and size.count('<path class="peer"') == 1
    assert bits.count("<title>") == 4 * len(FILES)  # a norm is no matrix
    assert "blk.0.attn_q.weight: Q2_K, 2.625 bits" in bits


def test_errors_have_three_digits_and_classes_without_error_are_left_out() -> None:
    svg = draw_charts(FILES, "GLM")["error-by-class.svg"][1]
    texts = [e.text for e in ElementTree.fromstring(svg).iter()]
    assert texts.count("0.0835") == texts.count("0.0021") == len(FILES)
    assert "UD-A, attn_q: 0.0835" in texts and "ffn_gate_inp" not in texts
    assert texts.index("token_embd") < texts.index("attn_q")  # as in the chart of bits


def test_an_interval_that_reaches_down_to_nothing_is_cut() -> None:
    figures = {**FIGURES, "kld_mean": 0.1, "kld_mean_low": 0.0, "kld_mean_high": 0.2, "domains": {}}
    svg = draw_charts([ReportFile("Q", 10, figures, TENSORS)], "M")["kld-by-size.svg"][1]
    assert "KLD 0.1 (0 to 0.2)" in svg


def test_a_base_alone_has_no_chart_of_kld() -> None:
    figures = {**FIGURES, "kld_mean": 0.0, "domains": {}, "errors": {}}
    base = ReportFile("BF16", 10, figures, TENSORS, is_base=True)
    assert draw_charts([base], "M").keys() == {"bits.svg"}
