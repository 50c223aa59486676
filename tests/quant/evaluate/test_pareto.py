"""Which files are worth their bytes."""

import pytest

from quant.evaluate.pareto import find_dominated, lower_hull
from quant.evaluate.scores import Estimate

SIZES = {"UD-A": 10, "UD-B": 20, "UD-C": 30, "Q": 30}
KLD = {"UD-A": 0.3, "UD-B": 0.1, "UD-C": 0.2, "Q": 0.15}


def compare(first: str, second: str, noise: float = 0.01) -> Estimate:
    value = KLD[first] - KLD[second]
    return Estimate(value, value - noise, value + noise)


def test_a_larger_and_clearly_worse_file_is_dominated_and_within_a_ladder_breaks_it() -> None:
    dominated = find_dominated(SIZES, compare)
    assert [(d.file, d.by, d.in_ladder) for d in dominated] == [
        ("UD-C", "UD-B", True),
        ("Q", "UD-B", False),
    ]
    assert "the ladder is not monotone: UD-C is larger than UD-B" in str(dominated[0])
    assert "Q is dominated" in str(dominated[1]) and "0.05 (0.04 to 0.06)" in str(dominated[1])


def test_a_difference_within_the_noise_is_no_warning() -> None:
    assert find_dominated(SIZES, lambda a, b: compare(a, b, noise=0.2)) == ()


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
