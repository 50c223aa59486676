"""Allocation requests: what is refused before any work, and what an allocation is for."""

from pathlib import Path
from typing import Any

import pytest

from quant.core.errors import InputError
from quant.evaluate.allocation import AllocationRequest, allocate
from quant.plan.load import load_variant
from quant.plan.units import Constraints


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "size: expected one of sizes, bpw, fits and ladder"),
        ({"sizes": ("4MB",), "bpw": 4.0}, "size: expected one of sizes, bpw, fits and ladder"),
        ({"bpw": 4.0, "name": "a b"}, "name: expected letters, digits, '.', '_' and '-'"),
        ({"bpw": 4.0, "measured": 4}, "measured: expected a BF16 GGUF, found 'tiny-glm'"),
        ({"bpw": 4.0, "hessians": Path("h")}, "hessians: expected a BF16 GGUF"),
        ({"bpw": 4.0, "types": ("Q4_Q",)}, "did you mean"),
        ({"bpw": 4.0, "constraints": Constraints(excluded=frozenset({"Q4_Q"}))}, "did you mean"),
        ({"sizes": ("1MB",)}, "bytes for these types, found 1,000,000"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as refused:
        allocate(AllocationRequest(model="tiny-glm", **settings))
    assert problem in str(refused.value)


def test_a_wrong_name_is_refused_before_a_file_is_opened(tmp_path: Path) -> None:
    request = AllocationRequest(model=str(tmp_path / "none.gguf"), bpw=4.0, name='a"b')
    with pytest.raises(InputError, match=r"^name: expected letters"):
        allocate(request)


def test_a_memory_budget_counts_the_latent_kv_cache_of_mla_once() -> None:
    context = 100_000
    request = AllocationRequest(model="glm-4.7-flash", fits=f"24GB gpu, ctx {context}")
    [allocation] = allocate(request).allocations
    # 47 layers, a latent of 512 and a rotary part of 64 values, in F16.
    assert allocation.target.bytes == 24 * 10**9 - context * 47 * (512 + 64) * 2


def test_several_sizes_are_written_into_a_folder_under_names_without_spaces(
    tmp_path: Path,
) -> None:
    result = allocate(AllocationRequest(model="tiny-glm", sizes=("4 MB", "6MB")))
    paths = result.write(tmp_path / "out")
    assert [p.name for p in paths] == ["ALLOCATED-6MB.toml", "ALLOCATED-4MB.toml"]
    written = [load_variant(str(p)) for p in paths]
    assert written == [a.variant for a in result.allocations]


def test_a_single_size_is_written_into_one_file(tmp_path: Path) -> None:
    result = allocate(AllocationRequest(model="tiny-glm", sizes=("4MB",), name="MINE"))
    assert result.write(tmp_path / "v.toml") == [tmp_path / "v.toml"]
    assert load_variant(str(tmp_path / "v.toml")).name == "MINE"
    assert result.json()["variants"][0]["name"] == "MINE"
