"""The flow ``quantize``: build a release, every stage a Prefect task.

The stages and their order are those of ``quant.build``. Prefect's cache is off, because the store
of finished work is the only cache: a run that is started again after a crash continues there.
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
from quant.core.errors import CheckError, InputError, Unreachable
from quant.core.secrets import TOKEN
from quant.job import BuildRequest, choose_destination, prepare_job
from quant.release.change import Change

T = TypeVar("T")
# Prefect's default is no retry. Three, 30 s apart, on top of the client's own retries.
RETRIES = {"source": 3, "send": 3, "publish": 3}
"""How often a stage is retried after a transient failure. Only the stages that ask the hub."""
RETRY_SECONDS = 30
APPROVAL_SECONDS = 14 * 24 * 3600
"""How long a run waits for approval. A run that waited longer fails; a new one continues."""


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
        model: A recipe's name in recipes/models, or the path of a recipe.
        out: The folder for the release, relative to the deployment's folder.
        variants: Build only these. None builds all of the recipe's.
        revision: The commit of the hub repo, 40 letters, if the recipe does not pin it.
        work: The folder for finished stages. None: OUT/.work.
        llama_cpp: A folder with your own llama.cpp.
        publish: Publish the release, if a repo is named here or in the recipe.
        repo: The hub repo to publish to, OWNER/NAME. None: the recipe's.
        private: Make the repo private if it has to be made.
        pull_request: Open a pull request, which the repo's owners merge.
        dry_run: Report what publishing would change, and change nothing.
        approve: Show what publishing will change, and wait until this run is resumed.
        token_secret: The name of a Prefect secret block with the hub's token. None: HF_TOKEN.
        waive: Parts of the smoke test that may fail; the model card lists them.
        evaluate: Measure every file against BF16 on held-out text.
        sign_key: A file on the worker with the key to sign the release. None: unsigned.
        as_ready: Upload each variant when it passed its smoke test. It stays hidden until the
            release is published.
        uploads: Files that are uploaded at the same time.
        limit: Upload bandwidth in bytes a second, such as 50M. None: no limit.

    Returns:
        The path of the release's folder.
    """
    with use_token(token_secret):
        destination = None
        if publish:
            destination = choose_destination(
                model,
                repo,
                private=private,
                pull_request=pull_request,
                uploads=uploads,
                limit=limit,
            )
            if destination is None:
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
            destination=destination,
            dry_run=dry_run,
            waive=waive or (),
            evaluate=evaluate,
            key=sign_key,
            as_ready=as_ready,
        )
        job = prepare_job(request)
        result = builds.build_release(job, partial(run_stage, approve=approve and not dry_run))
    publish_release_summary(result)
    return str(result.folder)


def run_stage(stage: str, subject: str, work: Callable[[], T], approve: bool = False) -> T:
    """Run one stage as a Prefect task and return its result.

    A result that is worth a page becomes an artifact of the task, also if a smoke test failed.

    Args:
        stage: The stage's name, which is the task's.
        subject: What it works on, such as a variant.
        work: The stage.
        approve: Pause the flow after the stage that reports what publishing will change.
    """

    # Defined for each call: a decorator takes name and retries, and they are the stage's.
    @task(
        name=stage,
        task_run_name=f"{stage} {subject}",
        # Prefect's cache finds the record of a result and never looks at the files that it names.
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
        # Prefect's default timeout is one hour. The process waits and keeps the store locked, so
        # that nobody changes the files that are being approved.
        pause_flow_run(timeout=APPROVAL_SECONDS)
    return result


@contextmanager
def use_token(secret: str | None) -> Iterator[None]:
    """Set HF_TOKEN to the token of a secret block while the block runs.

    Args:
        secret: The name of the secret block. None leaves HF_TOKEN as it is.

    Raises:
        InputError: It is a token itself, which is not quoted.
    """
    # Prefect's block names have lower-case letters, digits and dashes (prefect/types/names.py): an
    # underscore means that the token itself was typed.
    if secret and "hf_" in secret:
        raise InputError(
            "token_secret: expected the name of a secret block, found a token; Prefect has stored"
            " it with this run's parameters: revoke it, and save a new one in a block"
        )
    # Put back at the end: a caller in the same process keeps its environment.
    before = os.environ.get(TOKEN)
    if secret:
        # load() is a coroutine only in async code.
        os.environ[TOKEN] = Secret.load(secret).get()  # type: ignore[union-attr]
    try:
        yield
    finally:
        if secret:
            os.environ.pop(TOKEN, None)
        if before is not None:
            os.environ[TOKEN] = before


def is_retryable(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Return whether a retry may help: the hub did not answer, or sent wrong bytes."""
    # CheckError: a wrong file was removed, so the retry fetches it again. Other stages that raise
    # it are not in RETRIES.
    return isinstance(state.result(raise_on_failure=False), (Unreachable, CheckError))
