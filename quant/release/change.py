"""What publishing a release would change on the hub; ``--dry-run`` shows it.

The change has three kinds of files. *Adds* are missing in the repo or differ there. *Removes*
belong to the release that the repo has now, by that release's own SHA256SUMS, and not to this one.
*Leaves* came with no release (a picture, a discussion's file) and are left alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from quant.core import secrets
from quant.core.errors import InputError, raise_problems
from quant.core.files import Receipt, hash_git_blob
from quant.hub import client as hub_client
from quant.hub.client import COMMIT, REPO
from quant.hub.upload import Destination
from quant.plan.recipe import CardRecipe
from quant.release.folder import (
    CHECKSUMS,
    SIGNATURE,
    ReleaseFolder,
    open_release,
    parse_checksums,
)
from quant.release.license import find_license_problems
from quant.release.manifest import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    HubFiles = Mapping[str, RepoFile]
    """What the hub has of a commit, by path."""


GIT_ATTRIBUTES = ".gitattributes"
"""The hub itself puts it into a repo."""


@dataclass(frozen=True)
class Change:
    """What publishing would do; nothing was done yet."""

    release: ReleaseFolder
    target: Destination
    head: str | None
    """The commit of the repo's main branch; None if there is no repo."""
    adds: tuple[Receipt, ...]
    """Files that the repo lacks, or has with other bytes."""
    removes: tuple[str, ...]
    """Files of the earlier release that this one does not have."""
    keeps: tuple[str, ...]
    """Files that are in the repo already with the right bytes."""
    leaves: tuple[str, ...]
    """Files that came with no release; they are left alone."""

    @property
    def tag(self) -> str:
        """The tag of the commit."""
        return self.target.tag or f"release-{self.release.digest[:12]}"

    @property
    def title(self) -> str:
        """The title of the commit, by which a later run recognizes the release."""
        return f"{self.release.folder.name}: release {self.release.digest[:12]}"

    @property
    def is_empty(self) -> bool:
        """Whether the repo has the release already."""
        return not self.adds and not self.removes

    @property
    def lines(self) -> tuple[str, ...]:
        """The change for people, a line for each file."""
        private = "private" if self.target.private else "public"
        fresh = "" if self.head else f" (to be made, {private})"
        how = "pull request" if self.target.pull_request else f"one commit, tag {self.tag}"
        where = f"{self.target.repo}{fresh}: {how}" + (f" on {self.head}" if self.head else "")
        size = sum(r.bytes for r in self.adds)
        return (
            f"{where}: {len(self.adds)} files, {size:,} bytes; {len(self.keeps)} are there",
            *(f"  add    {r.path}  {r.bytes:,} bytes  sha256 {r.sha256}" for r in self.adds),
            *(f"  remove {name}" for name in self.removes),
            *(f"  leave  {name}" for name in self.leaves),
        )


def preflight(target: Destination, card: CardRecipe, where: str) -> None:
    """Check, before hours of work, token, repo and license for publishing.

    Args:
        target: Where the release is to be published.
        card: The card of the model's recipe.
        where: Names the card in errors.

    Raises:
        InputError: With everything that forbids it.
        Unreachable: If the hub does not answer.
    """
    raise_problems([*_find_target_problems(target), *find_license_problems(card, where)])
    with hub_client.convert_errors(target.repo):
        api = hub_client.make_client()
        hub_client.retry(api.whoami)
        read_head(api, target)


def plan_change(folder: Path, target: Destination) -> Change:
    """Return what publishing the release in a folder would change. Only reads from the hub.

    Raises:
        InputError: With everything that forbids to publish it.
        CheckError: For a folder that was changed since it was made.
        Unreachable: If the hub does not answer.
    """
    raise_problems(_find_target_problems(target))
    release = open_release(folder)
    card = release.manifest.recipe.card
    raise_problems(find_license_problems(card, f"{folder / MANIFEST}: recipe.card"))
    with hub_client.convert_errors(target.repo):
        api = hub_client.make_client()
        head = read_head(api, target)
        remote = list_hub_files(api, target.repo, head) if head else {}
        change = _compare(api, release, target, head, remote)
        raise_problems(_find_tag_problems(api, change))
    return change


def read_head(api: "HfApi", target: Destination) -> str | None:
    """Return the commit of the repo's main branch, or None if there is no repo.

    Raises:
        InputError: If the repo is public and has to be private.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = hub_client.retry(lambda: api.repo_info(target.repo))
    # A subclass of RepositoryNotFoundError, although the repo exists.
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        # The hub answers the same for a missing repo and for a wrong token; whoami tells which.
        hub_client.retry(api.whoami)
        return None
    if target.private and not info.private:
        raise InputError(
            f"{target.repo}: expected a private repo, found a public one; make it private, or name"
            " another"
        )
    return str(info.sha)


def list_hub_files(api: "HfApi", repo: str, revision: str) -> "HubFiles":
    """Return every file of a commit, by path."""
    from huggingface_hub.hf_api import RepoFile

    def list_tree() -> list[object]:
        # The tree comes page by page. list() makes the retry cover every page.
        return list(api.list_repo_tree(repo, revision=revision, recursive=True))

    return {e.path: e for e in hub_client.retry(list_tree) if isinstance(e, RepoFile)}


def list_tags(api: "HfApi", repo: str) -> dict[str, str]:
    """Return the commit of every tag of a repo."""
    return {
        t.name: t.target_commit for t in hub_client.retry(lambda: api.list_repo_refs(repo)).tags
    }


def find_remote_differences(remote: "HubFiles", change: Change) -> Iterator[str]:
    """Yield a line for each file of the hub that is not as the release has it."""
    repo = change.target.repo
    for receipt in change.release.files:
        entry = remote.get(receipt.path)
        if entry is None:
            yield f"{repo}: {receipt.path}: missing on the hub"
        elif not _is_same_file(receipt, change.release.folder, entry):
            actual = f"sha256 {entry.lfs.sha256}" if entry.lfs else f"git's {entry.blob_id}"
            yield (
                f"{repo}: {receipt.path}: expected sha256 {receipt.sha256} ({receipt.bytes} bytes),"
                f" found {actual} ({entry.size} bytes)"
            )
    yield from (f"{repo}: {name}: still on the hub" for name in change.removes if name in remote)


def _find_target_problems(target: Destination) -> Iterator[str]:
    if not REPO.fullmatch(target.repo):
        yield f"repo: expected OWNER/NAME, found {secrets.redact_urls(target.repo)!r}"
    if target.parent and not COMMIT.fullmatch(target.parent):
        yield f"parent: expected a commit (40 letters of hex), found {target.parent!r}"
    tag = target.tag
    # The characters that git check-ref-format forbids. The hub would refuse them after the upload.
    if tag is not None and (not tag.strip() or any(c in tag for c in " ~^:?*[\\\n")):
        yield f"tag: expected a name that git accepts, found {tag!r}"
    if hub_client.read_token() is None:
        yield f"{secrets.TOKEN}: not set; publishing needs a token that may write to {target.repo}"


def _compare(
    api: "HfApi", release: ReleaseFolder, target: Destination, head: str | None, remote: "HubFiles"
) -> Change:
    ours = {r.path for r in release.files}
    adds = tuple(
        r for r in release.files if not _is_same_file(r, release.folder, remote.get(r.path))
    )
    others = sorted(remote.keys() - ours - {GIT_ATTRIBUTES})
    earlier = _list_earlier_release(api, target.repo, head, remote) if head and others else set()
    return Change(
        release=release,
        target=target,
        head=head,
        adds=adds,
        removes=tuple(name for name in others if name in earlier),
        keeps=tuple(sorted(ours - {r.path for r in adds})),
        leaves=tuple(name for name in others if name not in earlier),
    )


def _is_same_file(receipt: Receipt, folder: Path, entry: "RepoFile | None") -> bool:
    """Return whether the hub's file has the same bytes."""
    if entry is None or entry.size != receipt.bytes:
        return False
    if entry.lfs:
        return bool(entry.lfs.sha256 == receipt.sha256)
    # Files outside LFS are small; the hub knows only git's SHA-1 of them.
    return bool(entry.blob_id == hash_git_blob(folder / receipt.path))


def _list_earlier_release(api: "HfApi", repo: str, head: str, remote: "HubFiles") -> set[str]:
    """Return the files of the release that the repo has now, by that release's own list."""
    if CHECKSUMS not in remote:
        return set()
    with TemporaryDirectory() as temp:
        path = hub_client.retry(
            lambda: api.hf_hub_download(repo, CHECKSUMS, revision=head, local_dir=temp)
        )
        # The list does not name the signature. List and manifest are in every release, so neither
        # is ever removed.
        return {SIGNATURE, *parse_checksums(Path(path).read_text(), f"{repo}@{head}: {CHECKSUMS}")}


def _find_tag_problems(api: "HfApi", change: Change) -> Iterator[str]:
    """Yield that a tag exists already."""
    if change.head is None or change.target.pull_request:
        return
    at = list_tags(api, change.target.repo).get(change.tag)
    # A tag may not move, because others may have built on it. At the head of a repo that has the
    # release already, it is the tag of an earlier run.
    if at is not None and not (change.is_empty and at == change.head):
        yield (
            f"{change.target.repo}: tag {change.tag}: expected a name that is free, found it at"
            f" {at}; name another"
        )
