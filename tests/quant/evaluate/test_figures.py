"""Figures as they are published: their digits, and what two machines may differ by."""

import pytest

from quant.evaluate.figures import figures_close, format_figures, round_figure, round_figures

FIGURES = {"kld_mean": 0.1, "kld_mean_low": 0.09, "kld_mean_high": 0.11, "ppl": 10.0, "top1": 0.9}


def test_figures_keep_the_digits_that_do_not_change_from_machine_to_machine() -> None:
    rounded = round_figures(
        {
            "ppl": 12.34567,
            "kld_mean": 0.0123456,
            "top1": 0.912345,
            "chunks": 4000,
            "domains": {"a": {"kld_max": 1.23456}},
        }
    )
    assert rounded == {
        "ppl": 12.35,
        "kld_mean": 0.0123,
        "top1": 0.9123,
        "chunks": 4000,
        "domains": {"a": {"kld_max": 1.23}},
    }
    assert round_figure(0.0) == 0


def test_a_table_has_the_kld_with_half_of_its_interval() -> None:
    assert format_figures(FIGURES) == ("10", "0.100 ± 0.010", "90.0 %")
    assert format_figures(FIGURES | {"kld_mean": 0.0})[1] == "0"
    assert format_figures(None) == ("-", "-", "-")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"kld_mean": 0.104}, True),
        ({"kld_mean": 0.12}, False),
        ({"ppl": 10.2}, False),
        ({"top1": 0.88}, False),
    ],
)
def test_two_machines_may_differ_by_a_little(change: dict[str, float], same: bool) -> None:
    assert figures_close(FIGURES, FIGURES | change) is same
