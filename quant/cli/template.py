"""The commands about chat templates: mend one in a file, see what it makes of a conversation, hold it against the battery."""

from pathlib import Path

import click

from quant.cli import progress
from quant.cli.options import FILE, quant


@quant.group()
def template() -> None:
    """Chat templates: mend one, see what it renders, check it."""


@template.command("patch")
@click.argument("gguf", type=FILE)
@click.option("--patch", "name", metavar="NAME", help="A name of recipes/templates, or a path.  [the one that fits]")
@click.option("--out", "-o", type=FILE, required=True, help="The file to write; of a split model, its first shard.")
def patch_gguf(gguf: Path, name: str | None, out: Path) -> None:
    """Write GGUF (the first shard, if it is split) with its chat template mended; the tensors stay as they are."""
    from quant.rewrite import patch_file, what_was_written

    for line in what_was_written(patch_file(gguf, out, name)):
        progress.say(line)
