"""Publish a release on the hub in one commit, and compare every file there with the manifest afterwards.

Nothing is visible half-done: large files go to the hub's storage first, where nobody sees them, and one commit on the commit
that was expected shows all of it. Publishing again after any interruption sends only what is missing and commits at most
once: a hub that holds the release already is recognised, and a commit by somebody else in between stops the work.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quant.core import files, secrets
from quant.core.files import Receipt, hash_git_blob
from quant.core.format import to_pretty_json
from quant.errors import CheckError, InputError, Unreachable, raise_problems
from quant.hub import client as hub
from quant.hub.client import COMMIT, REPO
from quant.hub.upload import Destination, prepare_additions, upload_files
from quant.plan.recipe import CardRecipe
from quant.release.folder import SIGNATURE, ReleaseFolder, open_release, parse_checksums
from quant.release.license import card_problems
from quant.release.package import CHECKSUMS, MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMITS = 3
"""How often the commit is asked for when no answer comes; it names its parent, so it cannot happen twice."""
QUIET = (".gitattributes",)
"""What the hub itself puts into a repo."""


@dataclass(frozen=True)
class Change:
    """What publishing would do; nothing was done yet."""

    release: ReleaseFolder
    target: Destination
    head: str | None
    """What the repo is at; None when there is no repo."""
    adds: tuple[Receipt, ...]
    """Files that the repo lacks, or has otherwise."""
    removes: tuple[str, ...]
    """Files of an earlier release that this one does not have."""
    keeps: tuple[str, ...]
    """Files that are there already as they have to be."""
    foreign: tuple[str, ...]
    """Files that no release brought; they are left alone."""

    @property
    def tag(self) -> str:
        """The name that the commit gets."""
        return self.target.tag or f"release-{self.release.digest[:12]}"

    @property
    def title(self) -> str:
        """What the commit is called; it names the release, so that a later run knows it again."""
        return f"{self.release.folder.name}: release {self.release.digest[:12]}"

    @property
    def is_empty(self) -> bool:
        """Whether the repo holds the release already."""
        return not self.adds and not self.removes

    @property
    def lines(self) -> tuple[str, ...]:
        """The change as a person reads it."""
        made = (
            "" if self.head else f" (to be made, {'private' if self.target.private else 'public'})"
        )
        how = "pull request" if self.target.pull_request else f"one commit, tag {self.tag}"
        head = f"{self.target.repo}{made}: {how}" + (f" on {self.head}" if self.head else "")
        return (
            f"{head}: {len(self.adds)} files, {sum(r.bytes for r in self.adds):,} bytes; {len(self.keeps)} are there",
            *(f"  add    {r.path}  {r.bytes:,} bytes  sha256 {r.sha256}" for r in self.adds),
            *(f"  remove {name}" for name in self.removes),
            *(f"  leave  {name}" for name in self.foreign),
        )


@dataclass(frozen=True)
class Publication:
    """A release that stands on the hub, every file of it compared."""

    hub: str
    """Its address."""
    repo: str
    commit: str
    tag: str | None
    """None for a pull request: who merges it publishes it."""
    pull_request: str | None
    fresh: bool
    """False when it stood there already."""

    @property
    def url(self) -> str:
        """Where a person sees it."""
        return self.pull_request or f"{self.hub}/{self.repo}/tree/{self.tag}"


def preflight(target: Destination, card: CardRecipe, where: str) -> None:
    """Ask before hours of work what publishing will need at their end: the token, the repo, a licence that allows it.

    Raises InputError with everything that forbids it, Unreachable when the hub does not answer.
    """
    raise_problems([*_target_problems(target), *card_problems(asdict(card), where)])
    with hub.convert_errors(target.repo):
        api = hub.make_client()
        hub.retry(api.whoami)
        _head(api, target)


def plan_change(folder: Path, target: Destination) -> Change:
    """What publishing the release in a folder would change; asks the hub, and does nothing to it.

    Raises InputError with everything that forbids it, CheckFailed for a folder that was changed since it was made.
    """
    raise_problems(_target_problems(target))
    release = open_release(folder)
    raise_problems(
        card_problems(release.manifest["recipe"]["card"], f"{folder / MANIFEST}: recipe.card")
    )
    with hub.convert_errors(target.repo):
        api = hub.make_client()
        head = _head(api, target)
        there = _listing(api, target.repo, head) if head else {}
        changed = _compare(api, release, target, head, there)
        raise_problems(_tag_problems(api, changed))
    return changed


def publish_release(change: Change) -> Publication:
    """Make that change, in one commit.

    Raises InputError when somebody else's commit came in between, CheckFailed when the hub shows other files than were
    sent, Unreachable when it does not answer; the same call continues.
    """
    target = change.target
    with hub.convert_errors(target.repo):
        api = hub.make_client()
        if change.head is None:
            hub.retry(lambda: api.create_repo(target.repo, private=target.private, exist_ok=True))
            change = replace(change, head=_head(api, target))
        if change.is_empty:
            commit, pull, fresh = str(change.head), None, False
        else:
            _expect(change)
            commit, pull, fresh = _deliver(api, change)
        if pull is None:
            _tag(api, change, commit)
        wrong = list(_differences(_listing(api, target.repo, commit), change))
    if wrong:
        raise CheckError(*wrong)
    _record(change).unlink(missing_ok=True)
    return Publication(api.endpoint, target.repo, commit, None if pull else change.tag, pull, fresh)


def _target_problems(target: Destination) -> Iterator[str]:
    if not REPO.fullmatch(target.repo):
        yield f"repo: expected OWNER/NAME, found {secrets.redact_urls(target.repo)!r}"
    if target.parent and not COMMIT.fullmatch(target.parent):
        yield f"parent: expected a commit (40 letters of hex), found {target.parent!r}"
    if target.tag is not None and (
        not target.tag.strip() or any(c in target.tag for c in " ~^:?*[\\\n")
    ):
        yield f"tag: expected a name that git takes, found {target.tag!r}"
    if hub.read_token() is None:
        yield f"{secrets.TOKEN}: not set; publishing needs a token that may write to {target.repo}"


def _head(api: "HfApi", target: Destination) -> str | None:
    """The commit that the repo is at; None when there is no repo."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = hub.retry(lambda: api.repo_info(target.repo))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        hub.retry(
            api.whoami
        )  # the hub says the same of a repo that is not there and of a token that is none
        return None
    if target.private and not info.private:
        raise InputError(
            f"{target.repo}: expected a private repo, found a public one; make it private, or name another"
        )
    return str(info.sha)


def _listing(api: "HfApi", repo: str, revision: str) -> dict[str, Any]:
    """What the hub says of every file of a commit, by path."""
    from huggingface_hub.hf_api import RepoFile

    tree = hub.retry(lambda: list(api.list_repo_tree(repo, revision=revision, recursive=True)))
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _compare(
    api: "HfApi",
    release: ReleaseFolder,
    target: Destination,
    head: str | None,
    there: Mapping[str, Any],
) -> Change:
    ours = {r.path for r in release.files}
    adds = tuple(r for r in release.files if not _same(r, release.folder, there.get(r.path)))
    others = sorted(there.keys() - ours - set(QUIET))
    earlier = _earlier(api, target.repo, head, there) if head and others else set()
    return Change(
        release,
        target,
        head,
        adds,
        removes=tuple(name for name in others if name in earlier),
        keeps=tuple(sorted(ours - {r.path for r in adds})),
        foreign=tuple(name for name in others if name not in earlier),
    )


def _same(receipt: Receipt, folder: Path, entry: Any) -> bool:
    """Whether the hub's file is that file."""
    if entry is None or entry.size != receipt.bytes:
        return False
    if entry.lfs:
        return bool(entry.lfs.sha256 == receipt.sha256)
    return bool(entry.blob_id == hash_git_blob(folder / receipt.path))


def _earlier(api: "HfApi", repo: str, head: str, there: Mapping[str, Any]) -> set[str]:
    """The files that the release which stands there now lists as its own."""
    if CHECKSUMS not in there:
        return set()
    with TemporaryDirectory() as folder:
        path = hub.retry(
            lambda: api.hf_hub_download(repo, CHECKSUMS, revision=head, local_dir=folder)
        )
        return {SIGNATURE, *parse_checksums(Path(path).read_text(), f"{repo}@{head}: {CHECKSUMS}")}


def _tag_problems(api: "HfApi", change: Change) -> Iterator[str]:
    """A tag that is taken: it may not move, because somebody may have built on it."""
    if change.head is None or change.target.pull_request:
        return
    at = _tags(api, change.target.repo).get(change.tag)
    if at is not None and not (change.is_empty and at == change.head):
        yield f"{change.target.repo}: tag {change.tag}: expected a name that is free, found it at {at}; name another"


def _tags(api: "HfApi", repo: str) -> dict[str, str]:
    return {t.name: t.target_commit for t in hub.retry(lambda: api.list_repo_refs(repo)).tags}


def _expect(change: Change) -> None:
    """Stop when the repo is not at the commit that this publication began with, in this run or in an earlier one."""
    record = _record(change)
    begun: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        begun = dict(json.loads(record.read_text()))
    same = begun.get("repo") == change.target.repo and begun.get("release") == change.release.digest
    expected = change.target.parent or (begun.get("parent") if same else None) or str(change.head)
    if expected != change.head:
        raise InputError(_foreign(change.target.repo, expected, str(change.head)))
    begun = {
        "repo": change.target.repo,
        "release": change.release.digest,
        "parent": expected,
    }
    files.write_text(record, to_pretty_json(begun))


def _record(change: Change) -> Path:
    """Where a publication that is not finished remembers what it follows; beside the release."""
    folder = change.release.folder
    return folder.with_name(f"{folder.name}.publishing.json")


def _foreign(repo: str, expected: str, found: str) -> str:
    return (
        f"{repo}: expected commit {expected}, found {found}: somebody else's commit came in between;"
        f" look at it, and publish on it with --parent {found}"
    )


def _deliver(api: "HfApi", change: Change) -> tuple[str, str | None, bool]:
    """Send what is missing and commit it: the commit, its pull request if it is one, and whether it is new."""
    from huggingface_hub import CommitOperationDelete

    if change.target.pull_request and (open_one := _proposed(api, change)):
        return *open_one, False
    folder = change.release.folder
    with prepare_additions(
        {r.path: (folder / r.path, r.sha256) for r in change.adds}, change.target.limit
    ) as adds:
        upload_files(api, adds, change.target)
        return *_commit(api, change, [*adds, *map(CommitOperationDelete, change.removes)]), True


def _commit(api: "HfApi", change: Change, operations: Sequence[Any]) -> tuple[str, str | None]:
    """The one commit, and its pull request. An answer that does not come is no refusal: it is looked for first."""
    from httpx2 import HTTPError

    target = change.target
    for _ in range(COMMITS):
        try:
            made = api.create_commit(
                target.repo,
                operations,
                commit_message=change.title,
                parent_commit=change.head,
                create_pr=target.pull_request,
                num_threads=target.uploads,
            )
            return made.oid, made.pr_url
        except HTTPError as e:
            if not hub.is_transient(e) and hub.read_status(e) != 412:
                raise
            failed = e
        if found := _standing(api, change):
            return found
    raise Unreachable(
        f"{target.repo}: the hub did not take the commit ({hub.read_error_text(failed)}); run again to continue"
    )


def _standing(api: "HfApi", change: Change) -> tuple[str, str | None] | None:
    """The release on the hub, when a commit was made whose answer was lost; raises InputError for a foreign one."""
    if change.target.pull_request:
        return _proposed(api, change)
    head = str(_head(api, change.target))
    if head == change.head:
        return None
    if not list(_differences(_listing(api, change.target.repo, head), change)):
        return head, None
    raise InputError(_foreign(change.target.repo, str(change.head), head))


def _proposed(api: "HfApi", change: Change) -> tuple[str, str] | None:
    """An open pull request that holds this release already."""
    repo = change.target.repo
    pulls = hub.retry(
        lambda: list(
            api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open")
        )
    )
    for pull in pulls:
        if pull.title == change.title:
            revision = f"refs/pr/{pull.num}"
            if not list(_differences(_listing(api, repo, revision), change)):
                return str(hub.retry(partial(api.repo_info, repo, revision=revision)).sha), pull.url
    return None


def _tag(api: "HfApi", change: Change, commit: str) -> None:
    """Give the commit its name; one that it has already is left."""
    repo = change.target.repo
    hub.retry(lambda: api.create_tag(repo, tag=change.tag, revision=commit, exist_ok=True))
    at = _tags(api, repo).get(change.tag)
    if at != commit:
        raise CheckError(f"{repo}: tag {change.tag}: expected commit {commit}, found {at}")


def _differences(there: Mapping[str, Any], change: Change) -> Iterator[str]:
    """Files of the hub that are not the release's."""
    for receipt in change.release.files:
        entry = there.get(receipt.path)
        where = f"{change.target.repo}: {receipt.path}"
        if entry is None:
            yield f"{where}: missing on the hub"
        elif not _same(receipt, change.release.folder, entry):
            found = f"sha256 {entry.lfs.sha256}" if entry.lfs else f"git's {entry.blob_id}"
            yield f"{where}: expected sha256 {receipt.sha256} ({receipt.bytes} bytes), found {found} ({entry.size} bytes)"
    yield from (
        f"{change.target.repo}: {name}: still on the hub"
        for name in change.removes
        if name in there
    )
