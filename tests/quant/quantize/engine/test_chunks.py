"""The work in chunks: every row once, never of two experts, the longest first."""

import itertools
import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES
from quant.quantize.engine.chunks import (
    CHUNK_WEIGHTS,
    COST,
    KERNEL_COST,
    WorkItem,
    estimate_cost,
    order_work,
    select_costs,
    split_into_chunks,
)
from quant.quantize.engine.work import BYTES_PER_WEIGHT, FIXED_BYTES, count_threads
from quant.quantize.kernels.library import load_library

SHAPES = st.tuples(
    st.sampled_from((1, 32, 256, 4096, 151_552, 2**21)), st.integers(1, 5000), st.integers(1, 6)
).map(lambda s: s[: 1 + (s[1] * s[2] > 1) + (s[2] > 1)])


def tensor(shape: tuple[int, ...], name: str = "a.weight", offset: int = 0) -> TensorSpec:
    return TensorSpec(name, shape, TYPES["BF16"], offset)


@given(SHAPES)
def test_every_row_is_in_one_chunk_of_its_own_expert(shape: tuple[int, ...]) -> None:
    chunks = split_into_chunks(tensor(shape))
    rows = shape[1] if len(shape) > 1 else 1
    at = 0
    for no, chunk in enumerate(chunks):
        assert (chunk.index, chunk.first_row) == (no, at)
        assert chunk.rows > 0
        assert chunk.first_row // rows == (chunk.first_row + chunk.rows - 1) // rows == chunk.expert
        assert chunk.rows * shape[0] <= CHUNK_WEIGHTS or chunk.rows == 1
        at += chunk.rows
    assert at == math.prod(shape[1:])


@given(
    st.lists(
        st.tuples(SHAPES, st.sets(st.sampled_from(sorted(COST)), min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_the_longest_come_first_and_none_is_lost(
    requests: list[tuple[tuple[int, ...], set[str]]],
) -> None:
    items = [
        WorkItem(
            tensor(shape, f"t{i}.weight", i * 32), chunk, tuple(TYPES[t] for t in sorted(types))
        )
        for i, (shape, types) in enumerate(requests)
        for chunk in split_into_chunks(tensor(shape))[:20]
    ]
    ordered = order_work(items[::-1])
    assert Counter(ordered) == Counter(items)
    costs = [p.cost for p in ordered]
    assert costs == sorted(costs, reverse=True)
    for a, b in itertools.pairwise(ordered):
        assert a.cost > b.cost or (a.tensor.offset, a.chunk.index) < (
            b.tensor.offset,
            b.chunk.index,
        )


def test_every_type_that_can_be_written_has_a_measured_cost() -> None:
    assert set(COST) == {t for t in TYPES if t not in ("F64", "I8", "I16", "I32", "I64")}
    assert estimate_cost(2**20, [TYPES["Q8_0"], TYPES["Q4_K"]]) == COST["Q8_0"] + COST["Q4_K"]


def test_the_kernels_types_cost_less_than_the_same_types_by_ggml() -> None:
    assert select_costs(set(COST)) == COST
    here = select_costs({"Q4_K"})
    assert set(here) == set(COST)
    assert {name for name in COST if here[name] != COST[name]} == set(KERNEL_COST) - {"Q4_K"}
    assert all(here[name] < COST[name] for name in KERNEL_COST if name != "Q4_K")
    item = WorkItem(
        tensor((4096, 256)),
        split_into_chunks(tensor((4096, 256)))[0],
        (TYPES["Q4_K"], TYPES["IQ4_XS"]),
        here,
    )
    assert item.cost == COST["Q4_K"] + KERNEL_COST["IQ4_XS"]


def test_every_kernel_has_a_measured_cost() -> None:
    native = load_library()
    assert {t.name for t in TYPES.values() for i in native.sets if native.has(i, t)} in (
        set(),
        set(KERNEL_COST),
    )


def test_there_are_as_many_threads_as_fit_into_the_memory() -> None:
    items = [
        WorkItem(tensor((4096, 256)), split_into_chunks(tensor((4096, 256)))[0], (TYPES["Q8_0"],))
    ]
    item_bytes = 2**20 * BYTES_PER_WEIGHT
    assert count_threads(items, FIXED_BYTES + 3 * item_bytes) == 3
    assert count_threads(items, FIXED_BYTES + 4 * item_bytes - 1) == 3
    assert count_threads(items, 0) == 1
    assert count_threads([], 2**30) > 1
