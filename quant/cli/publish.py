"""The commands for a finished release: publish, sign, rebuild."""

from dataclasses import dataclass
from pathlib import Path

import click

from quant.cli import progress
from quant.cli.options import (
    FILE,
    FOLDER,
    DestinationOptions,
    collect_options,
    destination_options,
    quant,
    tools_option,
    work_option,
)
from quant.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PublishOptions(DestinationOptions):
    """The options of `quant publish`."""

    release: Path
    owner_name: str | None
    dry_run: bool


@quant.command(short_help="Publish a release on the hub.")
@click.argument("release", type=FOLDER)
@click.argument("owner_name", metavar="[OWNER/NAME]", required=False)
@destination_options
@click.option("--dry-run", is_flag=True, help="List what would change; change nothing.")
@collect_options(PublishOptions)
def publish(options: PublishOptions) -> None:
    """Publish a RELEASE folder on the hub in one commit, and compare every file afterwards.

    The repo is OWNER/NAME, or the one in the release's recipe. The token is read from HF_TOKEN.
    After an interruption the same command sends only what is missing, and commits at most once.
    """
    from quant.release.change import plan_change
    from quant.release.manifest import MANIFEST, Manifest
    from quant.release.publish import publish_release

    folder = options.release.expanduser().resolve()
    repo, name = options.repo, options.owner_name
    # Both spellings are accepted, and two that agree are no mistake.
    if repo and name and repo != name:
        raise InputError(
            f"expected one repo to publish to, found {name} and {repo}: quant publish RELEASE"
            " OWNER/NAME"
        )
    destination = options.make_destination(
        repo or name or Manifest.read(folder / MANIFEST).recipe.publish.repo
    )
    if destination is None:
        raise InputError(
            "expected one repo to publish to, found none: quant publish RELEASE OWNER/NAME"
        )
    change = plan_change(folder, destination)
    if options.dry_run:
        click.echo("\n".join(change.lines))
        return
    # Before the upload, which may take hours: the line names repo and size.
    progress.print_line(change.lines[0])
    publication = publish_release(change)
    click.echo(publication.url)
    if not publication.fresh:
        progress.print_line("nothing to do: this release is there already")


@quant.command(short_help="Sign a release.")
@click.argument("release", type=FOLDER)
@click.option(
    "--key",
    type=FILE,
    required=True,
    help="PEM file with an elliptic key; $QUANT_KEY_PASSWORD unlocks it.",
)
def sign(release: Path, key: Path) -> None:
    """Sign a RELEASE folder, so that `quant verify --public-key PUB.pem` can tell who made it.

    Writes model.sig, a bundle of OpenSSF's model signing; `quant publish` uploads it with the rest.
    Needs no network.
    """
    from quant.release.folder import SIGNATURE
    from quant.release.sign import sign_release

    folder = release.expanduser().resolve()
    fresh = sign_release(folder, key)
    click.echo(folder / SIGNATURE)
    if not fresh:
        progress.print_line("nothing to do: this key has signed these files already")


@quant.command(short_help="Build a release again and compare.")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=FOLDER, required=True, help="Folder for the new release.")
@click.option(
    "--source", type=FOLDER, help="The checkpoint, for a model that does not come from the hub."
)
@work_option
@tools_option
def rebuild(
    manifest: Path, out: Path, source: Path | None, work: Path | None, llama_cpp: Path | None
) -> None:
    """Build a release again in another folder and compare; exit code 1 if any byte differs.

    MANIFEST is a manifest.json or the folder of a release. Another version of this program may word
    the card, the report and the charts otherwise; such files are named.
    """
    from quant.llama.toolchain import find_toolchain
    from quant.rebuild import prepare_rebuild, rebuild_release

    # Before the bar: another llama.cpp or a missing checkpoint is wrong input, not a failed stage.
    job, old = prepare_rebuild(manifest, out, find_toolchain(llama_cpp), work, source)
    with progress.show_progress(job.steps) as run:
        result = rebuild_release(job, old, manifest, run)
    click.echo(f"{result.folder}: {len(result.compared)} files hold the same bytes")
    if result.uncompared:
        progress.print_line(
            f"not compared, for only the manifest was given: {', '.join(result.uncompared)}"
        )
    if result.figures:
        progress.print_line(
            f"measured slightly otherwise here, as processors do: {'; '.join(result.figures)}"
        )
    if result.reworded:
        progress.print_line(f"worded otherwise by this version: {', '.join(result.reworded)}")
    if result.packages:
        progress.print_line(
            "made with other packages, which changed provenance.json and SHA256SUMS only:"
            f" {'; '.join(result.packages)}"
        )
