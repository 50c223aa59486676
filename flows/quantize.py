"""The flow ``quantize``: a release, with every stage a task in Prefect's page.

The stages and their order are ``quant.build``'s. Prefect's cache is off, because the store of finished work is the only
one; a run that is started again after a crash continues there.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from flows.artifacts import tell, tell_release
from quant import build as builds
from quant.errors import CheckFailed, Unreachable

T = TypeVar("T")
RETRIES = {"source": 3}
"""How often a stage is tried again after a failure that may pass."""
RETRY_SECONDS = 30


@flow(name="quantize", flow_run_name="{model}", persist_result=False)
def quantize(
    model: str,
    out: str = "release",
    variants: list[str] | None = None,
    revision: str | None = None,
    work: str | None = None,
    llama_cpp: str | None = None,
) -> str:
    """Build the release of a model and return its folder.

    Args:
        model: A name of recipes/models, or a path to such a file.
        out: Where the release goes; relative to the folder of the deployment.
        variants: Only these; all of the recipe's when not given.
        revision: The commit of the hub repo, 40 letters, if the recipe does not pin it.
        work: Where finished stages are kept; OUT/.work when not given.
        llama_cpp: A folder with a llama.cpp of your own.
    """
    job = builds.prepare(model, variants or (), out=out, work=work, revision=revision, llama_cpp=llama_cpp)
    built = builds.build(job, as_task)
    tell_release(built)
    return str(built.folder)


def as_task(stage: str, subject: str, work: Callable[[], T]) -> T:
    """Run one stage as a Prefect task, and leave what it found as an artifact of that task."""

    @task(
        name=stage,
        task_run_name=f"{stage} {subject}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES.get(stage, 0),
        retry_delay_seconds=RETRY_SECONDS,
        retry_condition_fn=may_pass,
    )
    def run() -> T:
        result = work()
        tell(stage, subject, result)
        return result

    return run()


def may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failure may be over in a while: the hub did not answer, or sent other bytes than it lists."""
    return isinstance(state.result(raise_on_failure=False), (Unreachable, CheckFailed))
