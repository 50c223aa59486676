"""What a stage leaves to be read, as Prefect is given it."""

from typing import Any

import pytest

from flows import artifacts
from quant.evaluate.pareto import DominatedFile
from quant.evaluate.release import ReleaseEvaluation
from quant.evaluate.scores import Estimate

pytestmark = pytest.mark.prefect
TOLD = {
    "ppl": 9.5,
    "kld_mean": 0.01,
    "kld_mean_low": 0.008,
    "kld_mean_high": 0.012,
    "kld_p999": 0.5,
    "top1": 0.9,
}


def test_figures_are_a_table_of_all_and_every_domain_with_warnings_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[dict[str, Any]] = []
    monkeypatch.setattr(
        artifacts, "create_table_artifact", lambda **artifact: left.append(artifact)
    )
    dominated = (DominatedFile("Q", "UD-A", Estimate(0.1, 0.05, 0.2)),)
    files = {"UD-A": {**TOLD, "domains": {"code": TOLD | {"kld_mean": 0.02}}}}
    artifacts.publish_artifact(
        "evaluate", "2 files", ReleaseEvaluation({}, {}, {"ppl": 9.0}, files, dominated, ("maths",))
    )
    (artifact,) = left
    assert artifact["key"] == "evaluate-2-files"
    assert [(row["variant"], row["domain"], row["KLD"]) for row in artifact["table"]] == [
        ("UD-A", "all", 0.01),
        ("UD-A", "code", 0.02),
    ]
    assert artifact["description"].split("\n\n") == [
        "BF16: PPL 9.0",
        "not measured, too little held-out text: maths",
        str(dominated[0]),
    ]
