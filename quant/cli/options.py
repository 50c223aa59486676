"""The command group ``quant``, and the options that several commands share."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from quant.hub.upload import Destination
    from quant.quantize.engine.job import EngineSettings

T = TypeVar("T")
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


class AliasedOption(click.Option):
    """An option that is still accepted under its former names, which `--help` does not show."""

    def __init__(
        self, declarations: Sequence[str], aliases: Sequence[str], **settings: Any
    ) -> None:
        # The first name names the parameter, so the aliases come last.
        super().__init__([*declarations, *aliases], **settings)
        self.aliases = tuple(aliases)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option's row in the help text, without the aliases."""
        every = self.opts
        try:
            # click builds the row from `opts` and offers no hook for a part of them.
            self.opts = [name for name in every if name not in self.aliases]
            return super().get_help_record(ctx)
        finally:
            self.opts = every


variants_option = click.option(
    "--variant", "-v", "variants", multiple=True, metavar="V", help="Only this one; repeatable."
)
work_option = click.option(
    "--work", type=FOLDER, envvar="QUANT_WORK", help="Where finished stages are kept.  [OUT/.work]"
)
hessians_option = click.option(
    "--hessians",
    cls=AliasedOption,
    aliases=("--moments",),
    type=FILE,
    help="Hessians of BASE, from `quant hessians`: enables error compensation (GPTQ).  [off]",
)
tools_option = click.option(
    "--llama-cpp", type=FOLDER, help="A llama.cpp of your own.  [$QUANT_LLAMA_CPP]"
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(1), help="Threads that quantize.  [one for each core]"
)
memory_option = click.option(
    "--memory",
    metavar="SIZE",
    callback=lambda _c, _p, text: parse_size_option(text),
    help="Memory for quantization: 900M, 2G.  [1 GiB]",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on standard output."
)

_DESTINATION = (
    click.option(
        "--repo", metavar="OWNER/NAME", help="Publish to this hub repo; HF_TOKEN has the token."
    ),
    click.option("--private", is_flag=True, help="Make the repo private, if it is new."),
    click.option("--pull-request", is_flag=True, help="Open a pull request instead of publishing."),
    click.option(
        "--tag", help="The commit's tag.  [release-<first digits of the manifest's sha256>]"
    ),
    click.option("--parent", metavar="COMMIT", help="The commit to follow.  [the repo's head]"),
    click.option(
        "--uploads",
        type=click.IntRange(1, 32),
        default=4,
        show_default=True,
        help="Files uploaded at a time.",
    ),
    click.option(
        "--limit",
        metavar="SIZE",
        callback=lambda _c, _p, text: parse_size_option(text),
        help="Upload at most this much a second, all files together: 50M.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DestinationOptions:
    """Where to publish, and how."""

    repo: str | None
    private: bool
    pull_request: bool
    tag: str | None
    parent: str | None
    uploads: int
    limit: int | None

    def make_destination(self, repo: str | None) -> "Destination | None":
        """Return the destination that the options describe, or None without a repo."""
        from quant.hub.upload import Destination

        if not repo:
            return None
        return Destination(
            repo,
            private=self.private,
            pull_request=self.pull_request,
            tag=self.tag,
            parent=self.parent,
            uploads=self.uploads,
            limit=self.limit,
        )


def destination_options(command: Any) -> Any:
    """Give a command the options of :class:`DestinationOptions`."""
    # Decorators apply from the bottom up, so --help lists them in the order of the tuple.
    for option in reversed(_DESTINATION):
        command = option(command)
    return command


def collect_options(request: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Return a decorator that hands a command its options as one dataclass of their names.

    Example:
        >>> @dataclass(frozen=True)
        ... class Greeting:
        ...     name: str
        >>> @click.command()
        ... @click.option("--name")
        ... @collect_options(Greeting)
        ... def greet(greeting: Greeting) -> None:
        ...     click.echo(greeting.name)
    """

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        # click takes the name and the help text from the function that it gets.
        @wraps(command)
        def run(**options: Any) -> None:
            command(request(**options))

        return run

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gguf-foundry")
def quant() -> None:
    """From a model's BF16 weights on the hub to a tested GGUF release."""


def parse_size_option(text: str | None) -> int | None:
    """Return the bytes of a size such as 2G, or None for None. Raise BadParameter if it is none."""
    from quant.plan.recipe import SIZE, parse_size

    if text is None:
        return None
    # Here, for a usage error that names the option; the library would name a recipe's field.
    if not re.fullmatch(SIZE, text):
        raise click.BadParameter(f"expected a number with M or G behind it, found {text!r}")
    return parse_size(text)


def make_engine_settings(jobs: int | None, memory: int | None) -> "EngineSettings":
    """Return the engine's settings from --jobs and --memory; None keeps a default."""
    from quant.quantize.engine.job import EngineSettings

    # None would replace the default of the class, not choose it.
    return EngineSettings(jobs, memory) if memory else EngineSettings(jobs)


def shorten(value: Any) -> str:
    """Return a value as one line of at most 110 characters, for a cell of a table."""
    text = " ".join(str(value).split())
    return text if len(text) <= 110 else f"{text[:107]}..."


def require_absent(path: Path) -> Path:
    """Return a path that does not exist. Raise UsageError if it does: no command overwrites."""
    if path.exists():
        raise click.UsageError(f"{path}: exists already; name another file or take it away")
    return path
