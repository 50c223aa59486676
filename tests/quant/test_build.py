"""A job from what a person says: what is asked is what will be done, and its stages are counted before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quant import build
from quant.cli.options import quant
from quant.errors import InputError

pytestmark = pytest.mark.tools


def test_a_build_that_measures_nothing_has_a_stage_less(tmp_path: Path) -> None:
    whole, without = (build.prepare("tiny-glm", out=tmp_path, evaluate=evaluate) for evaluate in (True, False))
    assert (whole.steps, without.steps) == (34, 33)
    assert without.model == replace(whole.model, evaluation=replace(whole.model.evaluation, chunks=0))


@pytest.mark.parametrize(("option", "measures"), [((), True), (("--evaluate",), True), (("--no-evaluate",), False)])
def test_the_command_line_says_whether_files_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: tuple[str, ...], measures: bool
) -> None:
    jobs: list[build.Job] = []

    def stop(job: build.Job, _do: Any) -> None:
        jobs.append(job)
        raise InputError("far enough")

    monkeypatch.setattr(build, "build", stop)
    done = CliRunner().invoke(quant, ["build", "tiny-glm", "-o", str(tmp_path), *option])
    assert isinstance(done.exception, InputError), done.output
    assert [bool(job.model.evaluation.chunks) for job in jobs] == [measures]
