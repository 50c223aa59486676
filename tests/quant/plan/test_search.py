"""The search: it finds what probes cannot show, and measures no file twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from quant.plan.allocate import allocate_variant
from quant.plan.budgets import SizeTarget
from quant.plan.search import SearchResult, search_allocations
from quant.plan.sensitivity import Sensitivities
from quant.plan.units import Constraints
from tests.quant.plan.conftest import make_inputs

INPUTS = make_inputs("tiny-glm")
SCALES = INPUTS.sensitivities.scales
TARGET = SizeTarget(4_000_000)
FACTORS = np.exp(np.random.default_rng(1).normal(0, 1, len(SCALES)))
TRUTH = replace(
    INPUTS.sensitivities,
    scales={n: v * float(f) for (n, v), f in zip(SCALES.items(), FACTORS, strict=True)},
    power=0.8,
)
"""What files really do; the sensitivities know only a part of it."""
COUNT = 26
"""Two rounds, and a part of a third."""


def measure(files: Sequence[Mapping[str, str]]) -> list[float]:
    return [TRUTH.predict_kld(types, INPUTS.errors) for types in files]


@dataclass(frozen=True)
class Search:
    """A search, and every file that it asked for, in order."""

    result: SearchResult
    files: list[frozenset[tuple[str, str]]]


@pytest.fixture(scope="module")
def search() -> Search:
    """One search, which takes seconds."""
    files: list[frozenset[tuple[str, str]]] = []

    def record(candidates: Sequence[Mapping[str, str]]) -> list[float]:
        files.extend(frozenset(types.items()) for types in candidates)
        return measure(candidates)

    result = search_allocations(INPUTS, TARGET, "V", Constraints(), measure=record, count=COUNT)
    return Search(result, files)


def test_measured_files_lead_to_a_better_allocation_of_the_same_size(search: Search) -> None:
    result = search.result
    assert result.kld < 0.9 * result.first_kld
    assert result.kld == TRUTH.predict_kld(result.best.solution.types, INPUTS.errors)
    assert 0.998 * TARGET.bytes <= result.best.bytes <= TARGET.bytes


def test_it_begins_with_the_exact_solution_and_measures_no_file_twice(search: Search) -> None:
    files, result = search.files, search.result
    assert len(files) == len(set(files)) == len(result.measured) == COUNT
    exact = allocate_variant(INPUTS, TARGET, "V", Constraints())
    assert files[0] == frozenset(exact.solution.types.items())
    assert result.measured[0][1] == result.first_kld


def test_refitted_sensitivities_predict_files_better(search: Search) -> None:
    def mean_error(s: Sensitivities) -> float:
        measured = search.result.measured
        logs = [np.log(s.predict_kld(types, INPUTS.errors) / kld) for types, kld in measured]
        return float(np.abs(logs).mean())

    assert mean_error(search.result.sensitivities) < 0.5 * mean_error(INPUTS.sensitivities)


def test_every_candidate_keeps_the_constraints() -> None:
    limits = Constraints(pinned={r"output\.weight": "Q6_K"}, excluded=frozenset({"IQ2_S"}))
    result = search_allocations(INPUTS, TARGET, "V", limits, measure=measure, count=14)
    for types, _ in result.measured:
        assert types["output.weight"] == "Q6_K"
        assert "IQ2_S" not in types.values()


def test_it_ends_where_there_is_only_one_allocation() -> None:
    limits = Constraints(pinned={".*": "Q4_K"}, mtp_pinned=False)
    target = SizeTarget(4_873_312)
    result = search_allocations(INPUTS, target, "V", limits, measure=measure, count=20)
    assert len(result.measured) == 1
