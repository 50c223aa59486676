"""What allocating GLM-4.6's published ladder takes, from its numbers alone: ``python -m tests.benchmarks.allocation``."""

import sys
from pathlib import Path

from tests.benchmarks.measured import machine, measured

WORK = """
from tests.quant.plan.test_budgets import GLM, PUBLISHED, Constraints, SizeTarget, allocate_variant
for name, gigabytes in PUBLISHED.items():
    allocate_variant(GLM, SizeTarget(int(gigabytes * 1e9)), name, "For tests.", Constraints())
"""


def main() -> None:
    """Measure, and say it in a line."""
    m = measured([sys.executable, "-c", WORK], cwd=Path.cwd())
    print(
        f"{machine()}: nine sizes of GLM-4.6 in {m.wall_s:.1f} s, at most {m.peak_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
