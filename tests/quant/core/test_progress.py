"""Whoever works may tell how far it is, whether somebody listens or not."""

from quant.core.progress import listen_to_progress, report_progress


def test_progress_is_reported_to_the_innermost_listener_only() -> None:
    outer: list[float] = []
    inner: list[float] = []
    with listen_to_progress(outer.append):
        report_progress(0.1)
        with listen_to_progress(inner.append):
            report_progress(0.2)
        report_progress(0.3)
    report_progress(0.4)  # nobody listens any more
    assert (outer, inner) == ([0.1, 0.3], [0.2])
