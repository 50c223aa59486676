"""The commands that make whole releases. A command imports what it needs when it runs, so `quant --help` stays quick."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.cli import progress, tables
from quant.cli.options import (
    FILE,
    FOLDER,
    destination_options,
    jobs_option,
    make_destination,
    make_engine_settings,
    memory_option,
    quant,
    tools_option,
    variants_option,
    work_option,
)

if TYPE_CHECKING:
    from quant.job import BuildRequest

COLUMNS = ("variant", ">bytes", ">bits/weight", ">files", ">KLD", ">top-1", "smoke test")


@quant.command()
@click.option(
    "--out",
    "-o",
    type=FOLDER,
    default=Path("release"),
    show_default=True,
    help="Where the release goes.",
)
@variants_option
@work_option
@tools_option
def demo(out: Path, variants: tuple[str, ...], work: Path | None, llama_cpp: Path | None) -> None:
    """The whole way, on the tiny model that the project ships: a few minutes, no download."""
    from quant.job import BuildRequest

    _build(BuildRequest("tiny-glm", out, variants, work=work, llama_cpp=llama_cpp))


@quant.command()
@click.argument("model")
@click.option("--out", "-o", type=FOLDER, required=True, help="Where the release goes.")
@click.option(
    "--revision",
    metavar="COMMIT",
    help="The commit of the hub repo, if the recipe does not pin it.",
)
@click.option(
    "--waive",
    multiple=True,
    metavar="NAME",
    help="What may fail in smoke tests; the card says so. Repeatable.",
)
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    help="Measure the files against BF16, or not.  [measure]",
)
@variants_option
@work_option
@jobs_option
@memory_option
@tools_option
@destination_options
@click.option(
    "--as-ready",
    is_flag=True,
    help="With --repo: send each variant as soon as it talks, unseen until the end.",
)
@click.option(
    "--sign",
    "key",
    type=FILE,
    metavar="KEY",
    help="Sign the release with this key: see `quant sign`.",
)
@click.option(
    "--dry-run", is_flag=True, help="With --repo: say what would change there, and publish nothing."
)
def build(
    model: str,
    variants: tuple[str, ...],
    jobs: int | None,
    memory: int | None,
    repo: str | None,
    dry_run: bool,
    **more: Any,
) -> None:
    """Build the release of MODEL: a name of recipes/models, or a path to such a file. With --repo, publish it there."""
    from quant.job import BuildRequest

    destination = make_destination(repo, more)
    _build(
        BuildRequest(
            model,
            variants=variants,
            settings=make_engine_settings(jobs, memory),
            destination=destination,
            dry_run=dry_run,
            **more,
        )
    )


@quant.command()
@click.argument("model")
@click.option("--revision", help="A branch, tag or commit.  [the recipe's]")
def lock(model: str, revision: str | None) -> None:
    """Pin MODEL's source: write the commit and every file's digest beside its recipe."""
    from quant.hub import lock as locks
    from quant.plan.load import load_model

    recipe, path = load_model(model)
    locked = locks.write_lock(recipe.source, path, revision)
    progress.print_line(
        f"{locks.locate_lock(path)}: {locked.repo}@{locked.revision}, {len(locked.files)} files"
    )


@quant.command()
@click.argument("model")
@click.option(
    "--revision",
    metavar="COMMIT",
    help="The commit of the hub repo, if the recipe does not pin it.",
)
@click.option(
    "--work", type=FOLDER, envvar="QUANT_WORK", default=Path("release/.work"), show_default=True
)
def pull(model: str, revision: str | None, work: Path) -> None:
    """Fetch and verify the checkpoint of MODEL; prints its folder."""
    from quant import build as builds
    from quant.core.store import Store
    from quant.job import load_pinned_model

    recipe, path, locked = load_pinned_model(model, revision)
    store = Store(work.expanduser().resolve() / recipe.name)
    with store.lock():
        checkpoint = builds.pull_locked(recipe, path, locked, store)
    progress.print_line(
        f"{len(checkpoint.receipts)} files, {sum(r.bytes for r in checkpoint.receipts):,} bytes, all verified"
    )
    click.echo(checkpoint.folder)


@quant.command()
@click.argument("release", type=FOLDER)
@click.option(
    "--public-key", type=FILE, help="Check that the release was signed by the owner of this key."
)
def verify(release: Path, public_key: Path | None) -> None:
    """Read every byte of a RELEASE folder and hold it against its own lists, recipes and card; exit 1 when anything differs."""
    from quant.errors import CheckError
    from quant.release.verify import verify_release as look_at

    found = look_at(release, public_key)
    if found.problems:
        raise CheckError(*found.problems)
    for line in found.checked:
        click.echo(f"checked: {line}")
    for line in found.unchecked:
        click.echo(f"not checked: {line}")
    click.echo(f"{release}: every file and every tensor is what the manifest says")


def _build(request: "BuildRequest") -> None:
    from quant.build import build_release
    from quant.job import prepare_job
    from quant.release.package import list_warnings, variants_table

    began = time.monotonic()
    job = prepare_job(request)
    with progress.show_progress(job.steps) as run:
        result = build_release(job, run)
    tables.print_table(COLUMNS, variants_table(result.release.manifest))
    for line in list_warnings(result.release.manifest):
        click.echo(f"warning: {line}")
    click.echo(f"{result.folder}")
    if result.change and not result.publication:
        click.echo("\n".join(result.change.lines))
    if result.publication:
        click.echo(result.publication.url)
    if result.fresh or (result.publication and result.publication.fresh):
        progress.print_line(f"done in {time.monotonic() - began:.0f} s")
    else:
        progress.print_line("nothing to do: this release exists already, made of the same inputs")
