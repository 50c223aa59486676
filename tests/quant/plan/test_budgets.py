"""Size targets: units, memory budgets, and bits per weight."""

import pytest

from quant.core.errors import InputError
from quant.plan.budgets import SizeTarget, parse_file_size, parse_memory_budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("84GB", 84 * 10**9),
        ("80.5 GiB", int(80.5 * 2**30)),
        ("4843584B", 4843584),
        ("900MB", 9 * 10**8),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, expected: int) -> None:
    assert parse_file_size(text) == expected


@pytest.mark.parametrize("text", ["84", "GB", "-3GB", "3 gb", ""])
def test_a_size_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a number with one of B, kB, MB"):
        parse_file_size(text)


def test_a_memory_budget_leaves_space_for_the_kv_cache() -> None:
    assert parse_memory_budget("24GB gpu + 128GB ram, ctx 1000", 10**6) == SizeTarget(
        151 * 10**9, 23 * 10**9
    )
    assert parse_memory_budget("24GB gpu", 10**6) == SizeTarget(24 * 10**9)
    assert parse_memory_budget("64GB ram, ctx 1000", 10**6) == SizeTarget(63 * 10**9)


def test_a_text_that_is_no_memory_budget_is_refused_with_an_example() -> None:
    with pytest.raises(InputError, match="expected a text like '24GB gpu"):
        parse_memory_budget("a large machine", 1)
