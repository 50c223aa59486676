"""Publish a release in one commit, and compare every file on the hub with it afterwards.

Nobody sees half a release. Large files go to the hub's storage first, where no commit names them;
then one commit on the expected parent shows all of them. Publishing again after any interruption
sends only what is missing and commits at most once: a hub that has the release already is
recognized, and a commit by somebody else in between stops the work.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.core import files
from quant.core.errors import CheckError, InputError, Unreachable
from quant.core.format import to_pretty_json
from quant.hub import client as hub_client
from quant.hub.upload import prepare_additions, upload_files
from quant.release.change import (
    Change,
    find_remote_differences,
    list_hub_files,
    list_tags,
    read_head,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_TRIES = 3
"""How often to ask for the commit. It names its parent, so it cannot happen twice."""


@dataclass(frozen=True)
class Publication:
    """A release that is on the hub, every file compared."""

    hub: str
    """The hub's address."""
    repo: str
    commit: str
    tag: str | None
    """None for a pull request: whoever merges it publishes it."""
    pull_request: str | None
    fresh: bool
    """False if it was there already."""

    @property
    def url(self) -> str:
        """The page of the release."""
        return self.pull_request or f"{self.hub}/{self.repo}/tree/{self.tag}"


def publish_release(change: Change) -> Publication:
    """Make a change in one commit.

    Raises:
        InputError: If somebody else's commit came in between.
        CheckError: If the hub shows other files than were sent.
        Unreachable: If the hub does not answer; the same call continues.
    """
    target = change.target
    with hub_client.convert_errors(target.repo):
        api = hub_client.make_client()
        if change.head is None:
            hub_client.retry(
                # exist_ok: the repo may be that of a run that was killed.
                lambda: api.create_repo(target.repo, private=target.private, exist_ok=True)
            )
            # The hub itself makes the first commit, with .gitattributes. Ours follows it.
            change = replace(change, head=read_head(api, target))
        if change.is_empty:
            commit, pull_request, fresh = str(change.head), None, False
        else:
            _check_parent(change)
            commit, pull_request, fresh = _send(api, change)
        if pull_request is None:
            _create_tag(api, change, commit)
        differences = list(
            find_remote_differences(list_hub_files(api, target.repo, commit), change)
        )
    if differences:
        raise CheckError(*differences)
    _record_path(change).unlink(missing_ok=True)
    return Publication(
        hub=api.endpoint,
        repo=target.repo,
        commit=commit,
        tag=None if pull_request else change.tag,
        pull_request=pull_request,
        fresh=fresh,
    )


def _check_parent(change: Change) -> None:
    """Raise InputError if the repo is no longer at the commit that the publication began on."""
    # After a kill, the next run sees only the present head, which may be somebody else's commit. So
    # the first run keeps its parent in a record beside the release until the publication is done.
    path = _record_path(change)
    record: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        record = dict(json.loads(path.read_text()))
    key = {"repo": change.target.repo, "release": change.release.digest}
    begun = record.get("parent") if key.items() <= record.items() else None
    expected = change.target.parent or begun or str(change.head)
    if expected != change.head:
        raise InputError(_describe_other_commit(change.target.repo, expected, str(change.head)))
    files.write_text(path, to_pretty_json({**key, "parent": expected}))


def _record_path(change: Change) -> Path:
    """Return the record of a publication that is not finished."""
    folder = change.release.folder
    return folder.with_name(f"{folder.name}.publishing.json")


def _describe_other_commit(repo: str, expected: str, actual: str) -> str:
    return (
        f"{repo}: expected commit {expected}, found {actual}: somebody else's commit came in"
        f" between; look at it, and publish on it with --parent {actual}"
    )


def _send(api: "HfApi", change: Change) -> tuple[str, str | None, bool]:
    """Send what is missing and commit it. Return commit, pull request, and whether it is new."""
    from huggingface_hub import CommitOperationDelete

    if change.target.pull_request and (open_one := _find_pull_request(api, change)):
        return *open_one, False
    folder = change.release.folder
    sources = {r.path: (folder / r.path, r.sha256) for r in change.adds}
    with prepare_additions(sources, change.target.limit) as additions:
        upload_files(api, additions, change.target)
        operations = [*additions, *map(CommitOperationDelete, change.removes)]
        return *_commit(api, change, operations), True


def _commit(api: "HfApi", change: Change, operations: Sequence[Any]) -> tuple[str, str | None]:
    """Make the one commit. Return it, and its pull request."""
    from httpx2 import HTTPError

    target = change.target
    for _ in range(COMMIT_TRIES):
        try:
            commit = api.create_commit(
                target.repo,
                operations,
                commit_message=change.title,
                parent_commit=change.head,
                create_pr=target.pull_request,
                num_threads=target.uploads,
            )
            return commit.oid, commit.pr_url
        except HTTPError as e:
            # 412: the parent is no longer the head, perhaps because our commit is.
            if not hub_client.is_transient(e) and hub_client.read_status(e) != 412:
                raise
            # Python deletes e at the end of this block.
            failure = e
        # An answer that does not come is no refusal: the commit may have been made, so it is looked
        # for before the hub is asked again.
        if own_commit := _find_commit(api, change):
            return own_commit
    raise Unreachable(
        f"{target.repo}: the hub did not take the commit ({hub_client.read_error_text(failure)});"
        " run again to continue"
    )


def _find_commit(api: "HfApi", change: Change) -> tuple[str, str | None] | None:
    """Return our commit whose answer was lost. Raises InputError for somebody else's."""
    if change.target.pull_request:
        return _find_pull_request(api, change)
    head = str(read_head(api, change.target))
    if head == change.head:
        return None
    remote = list_hub_files(api, change.target.repo, head)
    if not list(find_remote_differences(remote, change)):
        return head, None
    raise InputError(_describe_other_commit(change.target.repo, str(change.head), head))


def _find_pull_request(api: "HfApi", change: Change) -> tuple[str, str] | None:
    """Return the commit and the page of an open pull request that has this release already."""
    repo = change.target.repo
    list_open = partial(
        api.get_repo_discussions, repo, discussion_type="pull_request", discussion_status="open"
    )
    for pull in hub_client.retry(lambda: list(list_open())):
        # The title has the release's digest. Files are compared too: others may push to a pull
        # request.
        if pull.title == change.title:
            revision = f"refs/pr/{pull.num}"
            remote = list_hub_files(api, repo, revision)
            if not list(find_remote_differences(remote, change)):
                info = hub_client.retry(partial(api.repo_info, repo, revision=revision))
                return str(info.sha), pull.url
    return None


def _create_tag(api: "HfApi", change: Change, commit: str) -> None:
    """Tag the commit, if it has not that tag already."""
    repo = change.target.repo
    hub_client.retry(lambda: api.create_tag(repo, tag=change.tag, revision=commit, exist_ok=True))
    # With exist_ok the client keeps an existing tag wherever it is, and reports nothing.
    at = list_tags(api, repo).get(change.tag)
    if at != commit:
        raise CheckError(f"{repo}: tag {change.tag}: expected commit {commit}, found {at}")
