"""The commands that make whole releases, and verify one."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quant.cli import progress, tables
from quant.cli.options import (
    FILE,
    FOLDER,
    DestinationOptions,
    collect_options,
    destination_options,
    jobs_option,
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

revision_option = click.option(
    "--revision",
    metavar="COMMIT",
    help="Commit of the hub repo, if neither recipe nor lock pins it.",
)


@dataclass(frozen=True, kw_only=True)
class BuildOptions(DestinationOptions):
    """The options of `quant build`."""

    model: str
    out: Path
    revision: str | None
    waive: tuple[str, ...]
    evaluate: bool
    variants: tuple[str, ...]
    work: Path | None
    jobs: int | None
    memory: int | None
    llama_cpp: Path | None
    as_ready: bool
    key: Path | None
    dry_run: bool

    def make_request(self) -> "BuildRequest":
        """Return the request that the options describe."""
        from quant.job import BuildRequest

        return BuildRequest(
            self.model,
            self.out,
            variants=self.variants,
            work=self.work,
            revision=self.revision,
            llama_cpp=self.llama_cpp,
            settings=make_engine_settings(self.jobs, self.memory),
            destination=self.make_destination(self.repo),
            dry_run=self.dry_run,
            waive=self.waive,
            evaluate=self.evaluate,
            as_ready=self.as_ready,
            key=self.key,
        )


@quant.command(short_help="Build a release of the tiny model.")
@click.option(
    "--out",
    "-o",
    type=FOLDER,
    default=Path("release"),
    show_default=True,
    help="Folder for the release.",
)
@variants_option
@work_option
@tools_option
def demo(out: Path, variants: tuple[str, ...], work: Path | None, llama_cpp: Path | None) -> None:
    """Build the release of the included tiny model: a few minutes, no download."""
    # Inside the function, as in all commands: `quant --help` need not load numpy or the client.
    from quant.job import BuildRequest

    _build(BuildRequest("tiny-glm", out, variants, work=work, llama_cpp=llama_cpp))


@quant.command(short_help="Build the release of a model.")
@click.argument("model")
@click.option("--out", "-o", type=FOLDER, required=True, help="Folder for the release.")
@revision_option
@click.option(
    "--waive",
    multiple=True,
    metavar="NAME",
    help="Allow this check of the smoke test to fail; the card names it. Repeatable.",
)
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    help="Measure every file against BF16, or not.  [evaluate]",
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
    help="With --repo: upload each variant after its smoke test; nobody sees it before the end.",
)
@click.option(
    "--sign",
    "key",
    type=FILE,
    metavar="KEY",
    help="Sign the release with this key: see `quant sign`.",
)
@click.option(
    "--dry-run", is_flag=True, help="With --repo: list what would change there; publish nothing."
)
@collect_options(BuildOptions)
def build(options: BuildOptions) -> None:
    """Build the release of MODEL, a recipe's name or path. With --repo, publish it."""
    _build(options.make_request())


@quant.command(short_help="Pin the commit and digests of a model.")
@click.argument("model")
@click.option("--revision", help="A branch, tag or commit.  [the recipe's]")
def lock(model: str, revision: str | None) -> None:
    """Lock MODEL's source: write its commit and the digest of every file beside the recipe."""
    from quant.hub.lock import locate_lock, write_lock
    from quant.plan.load import load_model

    recipe, path = load_model(model)
    locked = write_lock(recipe.source, path, revision)
    progress.print_line(
        f"{locate_lock(path)}: {locked.repo}@{locked.revision}, {len(locked.files)} files"
    )


@quant.command(short_help="Download and verify a checkpoint.")
@click.argument("model")
@revision_option
# The work folder of `quant build -o release`, so that a build finds what was pulled.
@click.option(
    "--work", type=FOLDER, envvar="QUANT_WORK", default=Path("release/.work"), show_default=True
)
def pull(model: str, revision: str | None, work: Path) -> None:
    """Download and verify the checkpoint of MODEL, and print its folder."""
    from quant.build import pull_locked
    from quant.core.store import Store
    from quant.job import load_pinned_model

    recipe, path, locked = load_pinned_model(model, revision)
    store = Store(work.expanduser().resolve() / recipe.name)
    # A build with the same --work would download into the same folder.
    with store.lock():
        checkpoint = pull_locked(recipe, path, locked, store)
    size = sum(r.bytes for r in checkpoint.receipts)
    progress.print_line(f"{len(checkpoint.receipts)} files, {size:,} bytes, all verified")
    click.echo(checkpoint.folder)


@quant.command(short_help="Check every byte of a release.")
@click.argument("release", type=FOLDER)
@click.option(
    "--public-key", type=FILE, help="Check that the owner of this key signed the release."
)
def verify(release: Path, public_key: Path | None) -> None:
    """Verify a RELEASE folder; exit code 1 if anything differs.

    Every byte is compared with its lists, every type with its recipe, every link of its card with
    its files.
    """
    from quant.core.errors import CheckError
    from quant.release.verify import verify_release

    result = verify_release(release, public_key)
    if result.problems:
        raise CheckError(*result.problems)
    for line in result.checked:
        click.echo(f"checked: {line}")
    for line in result.unchecked:
        click.echo(f"not checked: {line}")
    click.echo(f"{release}: every file and every tensor is what the manifest says")


def _build(request: "BuildRequest") -> None:
    from quant.build import build_release
    from quant.job import prepare_job
    from quant.release.texts import list_warnings, variants_table

    began = time.monotonic()
    # Outside of the bar: wrong input is reported before any stage is shown.
    job = prepare_job(request)
    with progress.show_progress(job.steps) as run:
        result = build_release(job, run)
    tables.print_table(COLUMNS, variants_table(result.release.manifest))
    for line in list_warnings(result.release.manifest):
        click.echo(f"warning: {line}")
    click.echo(f"{result.folder}")
    # A dry run: the list of changes is its result, so it goes to standard output.
    if result.change and not result.publication:
        click.echo("\n".join(result.change.lines))
    if result.publication:
        click.echo(result.publication.url)
    if result.fresh or (result.publication and result.publication.fresh):
        progress.print_line(f"done in {time.monotonic() - began:.0f} s")
    else:
        progress.print_line("nothing to do: this release exists already, made of the same inputs")
