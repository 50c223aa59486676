"""Which files are worth their bytes."""

import pytest

from quant.evaluate.pareto import Gap, find_dominated, lower_hull

SIZES = {"UD-A": 10, "UD-B": 20, "UD-C": 30, "Q": 30}
KLD = {"UD-A": 0.3, "UD-B": 0.1, "UD-C": 0.2, "Q": 0.15}


def gap(first: str, second: str, noise: float = 0.01) -> Gap:
    value = KLD[first] - KLD[second]
    return Gap(value, value - noise, value + noise)


def test_a_larger_rung_that_is_clearly_worse_breaks_the_ladder_and_any_other_file_is_dominated() -> (
    None
):
    found = find_dominated(SIZES, gap)
    assert [(b.file, b.by, b.in_ladder) for b in found] == [
        ("UD-C", "UD-B", True),
        ("Q", "UD-B", False),
    ]
    assert "the ladder is not monotone: UD-C is larger than UD-B" in str(found[0])
    assert "Q is dominated" in str(found[1]) and "0.05 (0.04 to 0.06)" in str(found[1])


def test_what_the_noise_can_explain_is_no_warning() -> None:
    assert find_dominated(SIZES, lambda a, b: gap(a, b, noise=0.2)) == ()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 3), (2, 1), (3, 2)], [(1, 3), (2, 1)]),
        ([(1, 4), (2, 3.5), (3, 1)], [(1, 4), (3, 1)]),
        ([(1, 4), (2, 2), (3, 1)], [(1, 4), (2, 2), (3, 1)]),
        ([], []),
    ],
)
def test_the_hull_is_below_every_point(
    points: list[tuple[float, float]], expected: list[tuple[float, float]]
) -> None:
    assert list(lower_hull(points)) == expected
