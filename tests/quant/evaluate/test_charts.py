"""Pictures: well-formed, always the same bytes, every file and tensor in them."""

from xml.etree import ElementTree

import pytest

from quant.evaluate.html import ReportFile, draw_charts, render_report

FIGURES = {
    "ppl": 10.0,
    "kld_mean": 0.1,
    "kld_mean_low": 0.05,
    "kld_mean_high": 0.2,
    "kld_median": 0.1,
    "kld_p99": 0.5,
    "kld_p999": 1.0,
    "kld_max": 2.0,
    "top1": 0.9,
    "errors": {"ffn_gate_inp": 0.0, "attn_q": 0.0834567, "token_embd": 0.0021},
}
TENSORS = {
    "token_embd.weight": "Q4_K",
    "blk.0.attn_q.weight": "Q2_K",
    "blk.1.attn_q.weight": "Q6_K",
    "blk.1.ffn_gate_inp.weight": "F32",
    "output_norm.weight": "F32",
}


def shown(name: str, size: int, kld: float, *, peer: bool = False) -> ReportFile:
    told = FIGURES | {"kld_mean": kld, "kld_mean_low": kld / 2, "kld_mean_high": 2 * kld}
    return ReportFile(
        name, size, {**told, "domains": {"code": told, "chat": told}}, TENSORS, peer=peer
    )


FILES = [
    shown("UD-A", 10**9, 0.3),
    shown("UD-<B>", 2 * 10**9, 0.1),
    shown("Q4_K_M", 3 * 10**9, 0.2, peer=True),
]


@pytest.mark.parametrize(
    "name", ["kld-by-size.svg", "bits.svg", "error-by-class.svg", "kld-by-domain.svg"]
)
def test_a_picture_is_well_formed_and_always_the_same(name: str) -> None:
    _, svg = draw_charts(FILES, "GLM & more")[name]
    words = {e.text for e in ElementTree.fromstring(svg).iter()}
    assert {"UD-A", "UD-<B>", "Q4_K_M"} <= words
    assert svg == draw_charts(FILES, "GLM & more")[name][1]
    assert "http://www.w3.org/2000/svg" in svg and svg.count("http") == 1


def test_a_peer_has_a_mark_of_its_own_and_every_tensor_a_cell() -> None:
    found = draw_charts(FILES, "GLM")
    size, bits = found["kld-by-size.svg"][1], found["bits.svg"][1]
    assert size.count('<circle class="dot"') == 2 and size.count('<path class="peer"') == 1
    assert bits.count("<title>") == 4 * len(FILES)  # a norm is no matrix
    assert "blk.0.attn_q.weight: Q2_K, 2.625 bits" in bits


def test_what_a_class_lost_is_told_in_three_digits_and_what_none_lost_is_left_out() -> None:
    svg = draw_charts(FILES, "GLM")["error-by-class.svg"][1]
    words = [e.text for e in ElementTree.fromstring(svg).iter()]
    assert words.count("0.0835") == words.count("0.0021") == len(FILES)
    assert "UD-A, attn_q: 0.0835" in words and "ffn_gate_inp" not in words
    assert words.index("token_embd") < words.index("attn_q")  # as in the picture of bits


def test_a_base_alone_has_no_picture_of_divergence() -> None:
    assert draw_charts(
        [
            ReportFile(
                "BF16",
                10,
                {**FIGURES, "kld_mean": 0.0, "domains": {}, "errors": {}},
                TENSORS,
                is_base=True,
            )
        ],
        "M",
    ).keys() == {"bits.svg"}


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = render_report(FILES, "GLM", 9.5, ["Q is dominated"])
    assert (
        text.count("<tr") == 2 * (1 + len(FILES))
        and "UD-&lt;B&gt;" in text
        and "Q is dominated" in text
    )
    for word in ("src=", "href=", "@import", "url("):
        assert word not in text
