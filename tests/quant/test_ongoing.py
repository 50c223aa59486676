"""Whoever works may tell how far it is, whether somebody listens or not."""

from quant.ongoing import heard, tell


def test_what_is_told_is_heard_by_the_innermost_listener_only() -> None:
    outer: list[float] = []
    inner: list[float] = []
    with heard(outer.append):
        tell(0.1)
        with heard(inner.append):
            tell(0.2)
        tell(0.3)
    tell(0.4)  # nobody listens any more
    assert (outer, inner) == ([0.1, 0.3], [0.2])
