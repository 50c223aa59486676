"""The commands for a finished release: put it on the hub, and make it again. They import what they need when they run."""

from pathlib import Path
from typing import Any

import click

from quant.cli import progress
from quant.cli.options import (
    FILE,
    FOLDER,
    destination_options,
    make_destination,
    quant,
    tools_option,
    work_option,
)
from quant.errors import InputError


@quant.command()
@click.argument("release", type=FOLDER)
@click.argument("owner_name", metavar="[OWNER/NAME]", required=False)
@destination_options
@click.option("--dry-run", is_flag=True, help="Say what would change, and do nothing.")
def publish(
    release: Path, owner_name: str | None, repo: str | None, dry_run: bool, **settings: Any
) -> None:
    """Publish a RELEASE folder on the hub in one commit, and compare every file there with it afterwards.

    The repo is OWNER/NAME, or the one that the release's recipe names. The token is read from HF_TOKEN. After an
    interruption the same command sends only what is missing, and commits at most once.
    """
    from quant.release import publish as publishing
    from quant.release.folder import read_manifest

    folder = release.expanduser().resolve()
    named = repo or owner_name or read_manifest(folder)["recipe"].get("publish", {}).get("repo")
    if not named or (repo and owner_name and repo != owner_name):
        found = "none" if not named else f"{owner_name} and {repo}"
        raise InputError(
            f"expected one repo to publish to, found {found}: quant publish RELEASE OWNER/NAME"
        )
    change = publishing.plan_change(folder, make_destination(named, settings))
    if dry_run:
        click.echo("\n".join(change.lines))
        return
    progress.print_line(change.lines[0])
    published = publishing.publish_release(change)
    click.echo(published.url)
    if not published.fresh:
        progress.print_line("nothing to do: this release stands there already")


@quant.command()
@click.argument("release", type=FOLDER)
@click.option(
    "--key",
    type=FILE,
    required=True,
    help="A PEM file with an elliptic key; $QUANT_KEY_PASSWORD unlocks it.",
)
def sign(release: Path, key: Path) -> None:
    """Sign a RELEASE folder, so that `quant verify RELEASE --public-key PUB.pem` tells who made it.

    Writes model.sig, a bundle of OpenSSF's model signing; publishing takes it along. Nothing is asked of the network.
    """
    from quant.release import sign as signing
    from quant.release.folder import SIGNATURE

    folder = release.expanduser().resolve()
    fresh = signing.sign_release(folder, key)
    click.echo(folder / SIGNATURE)
    if not fresh:
        progress.print_line("nothing to do: this key has signed these files already")


@quant.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=FOLDER, required=True, help="Where the new release goes.")
@click.option(
    "--source", type=FOLDER, help="The checkpoint, for a model that does not come from the hub."
)
@work_option
@tools_option
def rebuild(
    manifest: Path, out: Path, source: Path | None, work: Path | None, llama_cpp: Path | None
) -> None:
    """Make the release of a MANIFEST again in another folder, and compare every byte; exit 1 when anything differs."""
    from quant import rebuild as rebuilding
    from quant.llama import toolchain

    tools = toolchain.find_toolchain(llama_cpp)
    job, known = rebuilding.prepare_rebuild(manifest, out, tools, work, source)
    with progress.show_progress(job.steps) as do:
        done = rebuilding.rebuild_release(job, known, manifest, do)
    click.echo(f"{done.folder}: {len(done.compared)} files hold the same bytes")
    if done.uncompared:
        progress.print_line(
            f"not compared, for only the manifest was given: {', '.join(done.uncompared)}"
        )
    if done.figures:
        progress.print_line(
            f"measured a little otherwise here, as processors do: {'; '.join(done.figures)}"
        )
    if done.packages:
        progress.print_line(
            f"made with other packages, which changed nothing: {'; '.join(done.packages)}"
        )
