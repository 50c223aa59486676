"""The commands for Ollama: merge shards, and see what Ollama makes of a release."""

import json
from pathlib import Path

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, FOLDER, json_option, quant, tools_option


@quant.command(short_help="Merge shards into one file, for Ollama.")
@click.argument("first_shard", type=FILE)
@click.argument("out", type=FILE)
@click.option(
    "--modelfile",
    is_flag=True,
    help="Write a Modelfile beside OUT, for `ollama create NAME -f Modelfile`.",
)
@click.option(
    "--model",
    help="The recipe whose parameters go into it.  [the release's params, or by the file's name]",
)
@tools_option
def merge(
    first_shard: Path, out: Path, modelfile: bool, model: str | None, llama_cpp: Path | None
) -> None:
    """Merge shards into OUT, for programs that need one file (Ollama). The shards stay."""
    from quant.core import files
    from quant.core.errors import InputError
    from quant.llama.toolchain import find_toolchain
    from quant.quantize.shard import merge_shards

    path = out.with_name("Modelfile")
    # Before the merge, which takes minutes: whatever is wrong with the Modelfile ends the command
    # here.
    text = _render_modelfile(first_shard, out, model) if modelfile else None
    if text and path.exists():
        raise InputError(f"{path}: exists already; remove it, or name a file in another folder")
    receipt = merge_shards(first_shard, out, find_toolchain(llama_cpp))
    progress.print_line(
        f"{out}: {receipt.bytes:,} bytes, every tensor as it was, sha256 {receipt.sha256}"
    )
    if text:
        files.write_text(path, text)
        progress.print_line(f"{path}: ollama create {out.stem.lower()} -f {path}")


@quant.group(short_help="Check what Ollama makes of a release.")
def ollama() -> None:
    """Ollama: what it makes of a release."""


@ollama.command()
@click.argument("release", type=FOLDER)
@click.option(
    "--repo",
    metavar="OWNER/NAME",
    help="Ask the hub, where it was published, and compare with the folder.",
)
@json_option
def check(release: Path, repo: str | None, as_json: bool) -> None:
    """Show what Ollama makes of every file of a RELEASE folder; exit code 1 if it is wrong."""
    from quant.core.errors import CheckError, InputError
    from quant.hub.client import REPO
    from quant.release.ollama_registry import check_release

    if repo and not REPO.fullmatch(repo):
        raise InputError(f"--repo: expected OWNER/NAME, found {repo!r}")
    result = check_release(release.expanduser().resolve(), repo)
    if as_json:
        click.echo(json.dumps(result.json(), ensure_ascii=False))
        # Faults are in the document; lines on standard error would repeat them.
        raise SystemExit(1 if result.all_faults else 0)
    place = repo or "OWNER/NAME"
    rows = [
        (f.file, f"hf.co/{place}:{f.tag}" if f.pulled else "not pulled", f.why)
        for f in result.files
    ]
    tables.print_table(("file", "ollama run", "why"), rows)
    for name, what in result.beside.items():
        click.echo(f"{name}: {what}")
    click.echo(f"without a tag: {result.default}")
    if result.all_faults:
        raise CheckError(*result.all_faults)


def _render_modelfile(first_shard: Path, out: Path, model: str | None) -> str:
    """Return a Modelfile with the parameters of the shard's release, or of its model's recipe."""
    from quant.core.errors import InputError
    from quant.plan.load import find_model_of_file, load_model
    from quant.release.modelfile import format_modelfile
    from quant.release.ollama import read_params, render_modelfile

    if model is None:
        # Shards lie in a folder of their own inside the release, single files at its root.
        for folder in first_shard.resolve().parents[:2]:
            if (folder / "params").is_file():
                system = folder / "system"
                text = system.read_text() if system.is_file() else None
                return format_modelfile(out.name, read_params(folder / "params"), text)
    if not (name := model or find_model_of_file(first_shard.name)):
        raise InputError(
            f"{first_shard.name}: expected a file name that begins with a model's title, found"
            " another; name the model with --model"
        )
    return render_modelfile(load_model(name)[0], out.name)
