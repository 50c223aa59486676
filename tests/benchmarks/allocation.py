"""Time and memory that allocating GLM-4.6's published ladder takes.

``python -m tests.benchmarks.allocation``; it needs no weights.
"""

import sys
from pathlib import Path

from tests.benchmarks.measured import machine, measured

WORK = """
from quant.plan.allocate import allocate_variant
from quant.plan.budgets import SizeTarget
from quant.plan.units import Constraints
from tests.quant.plan.test_allocate import GLM, PUBLISHED
for name, gigabytes in PUBLISHED.items():
    allocate_variant(GLM, SizeTarget(int(gigabytes * 1e9)), name, Constraints())
"""


def main() -> None:
    """Measure, and print a line."""
    m = measured([sys.executable, "-c", WORK], cwd=Path.cwd())
    print(
        f"{machine()}: nine sizes of GLM-4.6 in {m.wall_s:.1f} s,"
        f" at most {m.peak_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
