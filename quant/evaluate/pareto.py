"""Which files of a release are worth their bytes: the lower hull of KLD against size, and the files that others beat. Pure.

A file is beaten when one that is not larger is clearly nearer to the base: by a bootstrap over pairs of chunks, which both
files read, so that what is hard for both is not taken for a difference. It is a warning and stops nothing, because such a file
can have other reasons (a processor, a program that takes no other type). Among the files of one ladder, whose names begin
with ``UD-``, it means that the ladder is not monotone: its recipe wants work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

LADDER = "UD-"


@dataclass(frozen=True)
class Gap:
    """How much further one file is from the base than another, in mean KLD, and the interval that it lies in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DominatedFile:
    """A file that no one has to take for what it says."""

    file: str
    by: str
    gap: Gap

    @property
    def in_ladder(self) -> bool:
        """Whether both are rungs of one ladder."""
        return self.file.startswith(LADDER) and self.by.startswith(LADDER)

    def __str__(self) -> str:
        more = (
            f"its KLD is higher by {self.gap.value:.3g} ({self.gap.low:.3g} to {self.gap.high:.3g})"
        )
        if self.in_ladder:
            return f"the ladder is not monotone: {self.file} is larger than {self.by} and further from BF16; {more}"
        return f"{self.file} is dominated: {self.by} is not larger and nearer to BF16; {more}"


def find_dominated(
    sizes: Mapping[str, int], gap: Callable[[str, str], Gap]
) -> tuple[DominatedFile, ...]:
    """The files that are surely beaten, smallest first, each by the one that beats it by most.

    ``gap(a, b)`` is the mean KLD of a less that of b.
    """
    worst: dict[str, DominatedFile] = {}
    for small, large in combinations(sorted(sizes, key=lambda name: sizes[name]), 2):
        found = gap(large, small)
        if found.low > 0 and (large not in worst or found.value > worst[large].gap.value):
            worst[large] = DominatedFile(large, small, found)
    return tuple(worst[name] for name in sorted(worst, key=lambda name: sizes[name]))


def lower_hull(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lower left hull of points: what no other point, and no mixture of two, is below."""
    found: list[tuple[float, float]] = []
    for p in sorted(set(points)):
        if found and p[1] >= found[-1][1]:
            continue
        while len(found) > 1 and _below(found[-2], found[-1], p):
            found.pop()
        found.append(p)
    return tuple(found)


def _below(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether the line from a to c runs below b."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
