"""A search among measured files: it finds what probes could not tell, keeps to the size, and measures no file twice."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from quant.plan import priors
from quant.plan.budgets import AllocationInputs, SizeTarget
from quant.plan.inventory import list_tensors
from quant.plan.load import load_model
from quant.plan.plan import find_coverable
from quant.plan.search import search_allocations
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
ASKED: list[frozenset[tuple[str, str]]] = []


def measure(files: Sequence[Mapping[str, str]]) -> list[float]:
    ASKED.extend(frozenset(types.items()) for types in files)
    return [TRUTH.predicted(types, MATERIAL.errors) for types in files]


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    ASKED.clear()


def test_measured_files_find_a_better_allocation_of_the_same_size() -> None:
    found = search_allocations(MATERIAL, TARGET, "V", "For tests.", Constraints(), measure, 48)
    assert found.kld < 0.9 * found.first_kld
    assert found.kld == TRUTH.predicted(found.best.solution.types, MATERIAL.errors)
    assert 0.998 * TARGET.bytes <= found.best.bytes <= TARGET.bytes


def test_it_begins_with_the_exact_solution_and_measures_no_file_twice() -> None:
    found = search_allocations(MATERIAL, TARGET, "V", "For tests.", Constraints(), measure, 30)
    assert len(ASKED) == len(set(ASKED)) == len(found.measured) == 30
    assert found.measured[0][1] == found.first_kld


def test_every_candidate_keeps_to_the_constraints() -> None:
    limits = Constraints(pinned={r"output\.weight": "Q6_K"}, excluded=frozenset({"IQ2_S"}))
    found = search_allocations(MATERIAL, TARGET, "V", "For tests.", limits, measure, 14)
    for types, _ in found.measured:
        assert types["output.weight"] == "Q6_K"
        assert "IQ2_S" not in types.values()


def test_the_mended_scales_foretell_files_better() -> None:
    found = search_allocations(MATERIAL, TARGET, "V", "For tests.", Constraints(), measure, 36)

    def wrong(scales: object) -> float:
        logs = [np.log(scales.predicted(t, MATERIAL.errors) / k) for t, k in found.measured]  # type: ignore[attr-defined]
        return float(np.abs(logs).mean())

    assert wrong(found.sensitivities) < 0.5 * wrong(MATERIAL.sensitivities)


def test_it_ends_where_there_is_only_one_allocation() -> None:
    limits = Constraints(pinned={".*": "Q4_K"}, mtp_pinned=False)
    found = search_allocations(
        MATERIAL, SizeTarget(4_873_312), "V", "For tests.", limits, measure, 20
    )
    assert len(found.measured) == 1
