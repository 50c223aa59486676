"""A job from what a person says: what is asked is what will be done, and its stages are counted before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quant import build
from quant.cli.options import quant
from quant.core.errors import InputError
from quant.job import BuildRequest, ReleaseJob, prepare_job

pytestmark = pytest.mark.tools


def test_a_build_that_measures_nothing_has_a_stage_less(tmp_path: Path) -> None:
    whole, without = (
        prepare_job(BuildRequest("tiny-glm", out=tmp_path, evaluate=evaluate))
        for evaluate in (True, False)
    )
    assert (whole.steps, without.steps) == (34, 33)
    assert without.model == replace(
        whole.model, evaluation=replace(whole.model.evaluation, chunks=0)
    )


def test_a_build_with_feedback_has_a_stage_more_and_loses_less_than_half(tmp_path: Path) -> None:
    prepared = prepare_job(BuildRequest("tiny-glm", tmp_path, ("UD-IQ3_XXS",), evaluate=False))
    short = replace(prepared.model, imatrix=replace(prepared.model.imatrix, chunks=8))
    files: dict[bool, Any] = {}
    for feedback in (True, False):  # what was fed back must not serve the second
        model = replace(short, imatrix=replace(short.imatrix, feedback=feedback))
        job = replace(prepared, model=model, out=tmp_path / str(feedback))
        done: dict[str, Any] = {}

        def do(
            stage: str, subject: str, work: Callable[[], Any], done: dict[str, Any] = done
        ) -> Any:
            done[f"{stage} {subject}"] = work()
            return done[f"{stage} {subject}"]

        built = build.build_release(job, do)
        assert len(done) == job.steps
        assert any(stage.startswith("moments") for stage in done) == feedback
        assert ("error compensation (GPTQ)" in (built.folder / "README.md").read_text()) == feedback
        (files[feedback],) = done["quantize UD-IQ3_XXS"]
    before, after = files[False].errors, files[True].errors
    quantised = [name for name, error in before.items() if error and name != "token_embd.weight"]
    assert quantised
    assert sum(after[name] for name in quantised) < sum(before[name] for name in quantised) / 2


@pytest.mark.parametrize(
    ("option", "measures"), [((), True), (("--evaluate",), True), (("--no-evaluate",), False)]
)
def test_the_command_line_says_whether_files_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: tuple[str, ...], measures: bool
) -> None:
    jobs: list[ReleaseJob] = []

    def stop(job: ReleaseJob, _do: Any) -> None:
        jobs.append(job)
        raise InputError("far enough")

    monkeypatch.setattr(build, "build_release", stop)
    done = CliRunner().invoke(quant, ["build", "tiny-glm", "-o", str(tmp_path), *option])
    assert isinstance(done.exception, InputError), done.output
    assert [bool(job.model.evaluation.chunks) for job in jobs] == [measures]
