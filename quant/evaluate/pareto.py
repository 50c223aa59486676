"""Dominated files of a release, and the lower hull of KLD against size. Pure.

A file is dominated if one that is not larger is clearly closer to the base: the 95 % interval of
the difference, from a bootstrap over the chunks that both files read, lies above 0. The build warns
and does not fail, because there can be other reasons for such a file: a CPU, or a program that
supports no other type. Among variants of one ladder, whose names begin with ``UD-``, it means that
the ladder is not monotone: its recipe needs work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

from quant.evaluate.scores import Estimate

LADDER = "UD-"
"""Begins the names of variants of one ladder."""
Coordinates: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class DominatedFile:
    """A file, and the one that dominates it."""

    file: str
    by: str
    gap: Estimate
    """Mean KLD of the file less that of the other, in nats."""

    @property
    def in_ladder(self) -> bool:
        """Whether both are variants of one ladder."""
        return self.file.startswith(LADDER) and self.by.startswith(LADDER)

    def __str__(self) -> str:
        # A rebuild compares this text with the one in the manifest: it stays as it is.
        more = (
            f"its KLD is higher by {self.gap.value:.3g} ({self.gap.low:.3g} to {self.gap.high:.3g})"
        )
        if self.in_ladder:
            return (
                f"the ladder is not monotone: {self.file} is larger than {self.by} and further from"
                f" BF16; {more}"
            )
        return f"{self.file} is dominated: {self.by} is not larger and nearer to BF16; {more}"


def find_dominated(
    sizes: Mapping[str, int], compare: Callable[[str, str], Estimate]
) -> tuple[DominatedFile, ...]:
    """Return the dominated files, smallest first, each with the file that is better by most.

    Args:
        sizes: Bytes of each file.
        compare: ``compare(a, b)`` returns the mean KLD of a less that of b.
    """
    worst: dict[str, DominatedFile] = {}
    for small, large in combinations(sorted(sizes, key=lambda name: sizes[name]), 2):
        gap = compare(large, small)
        # The whole interval, not the mean: with eleven files there are 55 pairs to be wrong about.
        if gap.low > 0 and (large not in worst or gap.value > worst[large].gap.value):
            worst[large] = DominatedFile(large, small, gap)
    return tuple(worst[name] for name in sorted(worst, key=lambda name: sizes[name]))


def lower_hull(points: Sequence[Coordinates]) -> tuple[Coordinates, ...]:
    """Return the falling part of the lower convex hull of points, left to right.

    No point, and no mixture of two, lies below it. It is Andrew's monotone chain (1979), without
    points that rise.
    """
    hull: list[Coordinates] = []
    for p in sorted(set(points)):
        # From here on the hull would rise: a larger file that is no better.
        if hull and p[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], p):
            hull.pop()
        hull.append(p)
    return tuple(hull)


def _is_above(a: Coordinates, b: Coordinates, c: Coordinates) -> bool:
    """Return whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
