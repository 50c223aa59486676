"""The flow ``quantize``: a release, with every stage a task in Prefect's page.

The stages and their order are ``quant.build``'s. Prefect's cache is off, because the store of finished work is the only
one; a run that is started again after a crash continues there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from prefect import flow, get_run_logger, task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.flow_runs import pause_flow_run

from flows.artifacts import publish_artifact, publish_release_summary
from quant import build as builds
from quant.chat.smoke import SmokeTestError
from quant.core.secrets import TOKEN
from quant.errors import CheckError, InputError, Unreachable
from quant.job import BuildRequest, choose_destination, prepare_job
from quant.release.change import Change

T = TypeVar("T")
RETRIES = {"source": 3, "send": 3, "publish": 3}
"""How often a stage is tried again after a failure that may pass."""
RETRY_SECONDS = 30
APPROVAL_SECONDS = 14 * 24 * 3600
"""How long a release waits for the one who approves it; a run that waited longer fails, and a new one continues."""


@flow(name="quantize", flow_run_name="{model}", persist_result=False)
def quantize(
    model: str,
    out: str = "release",
    variants: list[str] | None = None,
    revision: str | None = None,
    work: str | None = None,
    llama_cpp: str | None = None,
    publish: bool = True,
    repo: str | None = None,
    private: bool = False,
    pull_request: bool = False,
    dry_run: bool = False,
    approve: bool = False,
    token_secret: str | None = None,
    waive: list[str] | None = None,
    evaluate: bool = True,
    sign_key: str | None = None,
    as_ready: bool = False,
    uploads: int = 4,
    limit: str | None = None,
) -> str:
    """Build the release of a model, publish it if there is a repo, and return its folder.

    Args:
        model: A name of recipes/models, or a path to such a file.
        out: Where the release goes; relative to the folder of the deployment.
        variants: Only these; all of the recipe's when not given.
        revision: The commit of the hub repo, 40 letters, if the recipe does not pin it.
        work: Where finished stages are kept; OUT/.work when not given.
        llama_cpp: A folder with a llama.cpp of your own.
        publish: Publish the release, if a repo is named here or in the recipe.
        repo: The hub repo to publish to, OWNER/NAME; the recipe's when not given.
        private: If the repo has to be made, make it private.
        pull_request: Propose the release as a pull request, and let the repo's owners merge it.
        dry_run: Only say what publishing would change.
        approve: Show what publishing will change, and wait until this run is resumed.
        token_secret: The name of a Prefect secret block that holds the hub's token; HF_TOKEN when not given.
        waive: Parts of the smoke test that may fail; the model card says so.
        evaluate: Measure every file against BF16, on text that was held out.
        sign_key: A file on the worker with the key that signs the release; nothing is signed when not given.
        as_ready: Send each variant to the hub as soon as it talks; nobody sees it there before the release is published.
        uploads: Files that are sent at the same time.
        limit: Bytes a second that sending may take, like 50M; as many as there are room for when not given.
    """
    with use_token(token_secret):
        target = (
            choose_destination(
                model,
                repo,
                private=private,
                pull_request=pull_request,
                uploads=uploads,
                limit=limit,
            )
            if publish
            else None
        )
        if publish and target is None:
            get_run_logger().warning(
                "Nothing will be published: no repo is named, here or in the recipe."
            )
        request = BuildRequest(
            model,
            variants=variants or (),
            out=out,
            work=work,
            revision=revision,
            llama_cpp=llama_cpp,
            destination=target,
            dry_run=dry_run,
            waive=waive or (),
            evaluate=evaluate,
            key=sign_key,
            as_ready=as_ready,
        )
        job = prepare_job(request)
        built = builds.build_release(job, partial(run_stage, approve=approve and not dry_run))
    publish_release_summary(built)
    return str(built.folder)


def run_stage(stage: str, subject: str, work: Callable[[], T], approve: bool = False) -> T:
    """Run one stage as a Prefect task, and leave what it found as an artifact of that task.

    With ``approve``, the flow waits after it has said what publishing will change, until somebody resumes it.
    """

    @task(
        name=stage,
        task_run_name=f"{stage} {subject}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES.get(stage, 0),
        retry_delay_seconds=RETRY_SECONDS,
        retry_condition_fn=is_retryable,
    )
    def run() -> T:
        try:
            result = work()
        except SmokeTestError as e:
            publish_artifact(stage, subject, e.result)
            raise
        publish_artifact(stage, subject, result)
        return result

    result = run()
    if approve and isinstance(result, Change) and not result.is_empty:
        pause_flow_run(timeout=APPROVAL_SECONDS)
    return result


@contextmanager
def use_token(secret: str | None) -> Iterator[None]:
    """Let the hub's client find the token of a secret block where it looks for one, as long as the run lasts.

    Raises InputError for what is a token itself, without telling it.
    """
    if secret and "hf_" in secret:  # the name of a block has no underscore
        raise InputError(
            "token_secret: expected the name of a secret block, found a token; Prefect has written it down with this run's"
            " parameters: revoke it, and save a new one in a block"
        )
    before = os.environ.get(TOKEN)
    if secret:
        os.environ[TOKEN] = Secret.load(secret).get()  # type: ignore[union-attr]  # load is a coroutine only in async code
    try:
        yield
    finally:
        if secret:
            os.environ.pop(TOKEN, None)
        if before is not None:
            os.environ[TOKEN] = before


def is_retryable(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failure may be over in a while: the hub did not answer, or sent other bytes than it lists."""
    return isinstance(state.result(raise_on_failure=False), (Unreachable, CheckError))
