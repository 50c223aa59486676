"""A search among measured files: it finds what probes could not tell, keeps to the size, and measures no file twice."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from quant.plan import priors
from quant.plan.budgets import AllocationInputs, SizeTarget, allocate_variant
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model
from quant.plan.plan import find_coverable
from quant.plan.search import SearchResult, search_allocations
from quant.plan.sensitivity import Sensitivities
from quant.plan.solver import Constraints

RECIPE, _ = load_model("tiny-glm")
TENSORS = list_tensors(RECIPE.architecture)
MATERIAL = AllocationInputs(
    TENSORS,
    frozenset(find_coverable(TENSORS)),
    priors.make_typical_errors(TENSORS),
    priors.make_prior_sensitivities(TENSORS),
    RECIPE.header_bytes,
)
TARGET = SizeTarget(4_000_000)
BY = dict(
    zip(
        MATERIAL.sensitivities.scales,
        np.exp(np.random.default_rng(1).normal(0, 1, len(MATERIAL.sensitivities.scales))),
        strict=True,
    )
)
TRUTH = replace(
    MATERIAL.sensitivities,
    scales={n: v * float(BY[n]) for n, v in MATERIAL.sensitivities.scales.items()},
    power=0.8,
)
"""What the files do, of which the sensitivities know only a part."""
COUNT = 26
"""Two rounds, and a part of a third."""


def measure(files: Sequence[Mapping[str, str]]) -> list[float]:
    return [TRUTH.predicted(types, MATERIAL.errors) for types in files]


@pytest.fixture(scope="module")
def searched() -> tuple[SearchResult, list[frozenset[tuple[str, str]]]]:
    """One search, which takes seconds, and every file that it asked for."""
    asked: list[frozenset[tuple[str, str]]] = []

    def record(files: Sequence[Mapping[str, str]]) -> list[float]:
        asked.extend(frozenset(types.items()) for types in files)
        return measure(files)

    result = search_allocations(MATERIAL, TARGET, "V", "For tests.", Constraints(), record, COUNT)
    return result, asked


def test_measured_files_find_a_better_allocation_of_the_same_size(
    searched: tuple[SearchResult, list[frozenset[tuple[str, str]]]],
) -> None:
    result, _ = searched
    assert result.kld < 0.9 * result.first_kld
    assert result.kld == TRUTH.predicted(result.best.solution.types, MATERIAL.errors)
    assert 0.998 * TARGET.bytes <= result.best.bytes <= TARGET.bytes


def test_it_begins_with_the_exact_solution_and_measures_no_file_twice(
    searched: tuple[SearchResult, list[frozenset[tuple[str, str]]]],
) -> None:
    result, asked = searched
    assert len(asked) == len(set(asked)) == len(result.measured) == COUNT
    exact = allocate_variant(MATERIAL, TARGET, "V", "For tests.", Constraints())
    assert asked[0] == frozenset(exact.solution.types.items())
    assert result.measured[0][1] == result.first_kld


def test_every_candidate_keeps_to_the_constraints() -> None:
    limits = Constraints(pinned={r"output\.weight": "Q6_K"}, excluded=frozenset({"IQ2_S"}))
    found = search_allocations(MATERIAL, TARGET, "V", "For tests.", limits, measure, 14)
    for types, _ in found.measured:
        assert types["output.weight"] == "Q6_K"
        assert "IQ2_S" not in types.values()


def test_the_refitted_scales_predict_files_better(
    searched: tuple[SearchResult, list[frozenset[tuple[str, str]]]],
) -> None:
    result, _ = searched

    def wrong(scales: Sensitivities) -> float:
        logs = [np.log(scales.predicted(t, MATERIAL.errors) / k) for t, k in result.measured]
        return float(np.abs(logs).mean())

    assert wrong(result.sensitivities) < 0.5 * wrong(MATERIAL.sensitivities)


def test_it_ends_where_there_is_only_one_allocation() -> None:
    limits = Constraints(pinned={".*": "Q4_K"}, mtp_pinned=False)
    found = search_allocations(
        MATERIAL, SizeTarget(4_873_312), "V", "For tests.", limits, measure, 20
    )
    assert len(found.measured) == 1
