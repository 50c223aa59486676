"""The commands for who runs a release in Ollama: put shards together, and see what Ollama makes of a release."""

import json
from pathlib import Path

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, FOLDER, json_option, quant, tools_option


@quant.command()
@click.argument("first_shard", type=FILE)
@click.argument("out", type=FILE)
@click.option(
    "--modelfile",
    is_flag=True,
    help="Write a Modelfile beside OUT, for `ollama create NAME -f Modelfile`.",
)
@click.option("--model", help="Whose parameters it has.  [the release's, else by the file's name]")
@tools_option
def merge(
    first_shard: Path, out: Path, modelfile: bool, model: str | None, llama_cpp: Path | None
) -> None:
    """Put the shards beside FIRST_SHARD together as OUT, for programs that take one file (Ollama). The shards stay."""
    from quant.core import files
    from quant.errors import InputError
    from quant.llama import toolchain
    from quant.quantize import shard

    beside, text = (
        out.with_name("Modelfile"),
        _modelfile(first_shard, out, model) if modelfile else None,
    )
    if text and beside.exists():
        raise InputError(
            f"{beside}: exists already; take it away, or name a file in another folder"
        )
    receipt = shard.merge_shards(first_shard, out, toolchain.find_toolchain(llama_cpp))
    progress.print_line(
        f"{out}: {receipt.bytes:,} bytes, every tensor as it was, sha256 {receipt.sha256}"
    )
    if text:
        files.write_text(beside, text)
        progress.print_line(f"{beside}: ollama create {out.stem.lower()} -f {beside}")


@quant.group()
def ollama() -> None:
    """Ollama: what it makes of a release."""


@ollama.command()
@click.argument("release", type=FOLDER)
@click.option(
    "--repo", metavar="OWNER/NAME", help="Ask the hub, where it has been published, and compare."
)
@json_option
def check(release: Path, repo: str | None, as_json: bool) -> None:
    """Tell for every file of a RELEASE folder what `ollama run hf.co/OWNER/NAME:TAG` makes of it; exit 1 if it is wrong."""
    from quant.errors import CheckError, InputError
    from quant.hub.client import REPO
    from quant.release import ollama_registry

    if repo and not REPO.fullmatch(repo):
        raise InputError(f"--repo: expected OWNER/NAME, found {repo!r}")
    found = ollama_registry.check_release(release.expanduser().resolve(), repo)
    if as_json:
        click.echo(json.dumps(found.json(), ensure_ascii=False))
        raise SystemExit(1 if found.all_faults else 0)
    place = repo or "OWNER/NAME"
    rows = [
        (f.file, f"hf.co/{place}:{f.tag}" if f.pulled else "not pulled", f.why) for f in found.files
    ]
    tables.print_table(("file", "ollama run", "why"), rows)
    for name, what in found.beside.items():
        click.echo(f"{name}: {what}")
    click.echo(f"without a tag: {found.default}")
    if found.all_faults:
        raise CheckError(*found.all_faults)


def _modelfile(first: Path, out: Path, model: str | None) -> str:
    """A Modelfile with what the release tells Ollama, or with what the recipe of the file's model says."""
    from quant.errors import InputError
    from quant.plan.load import find_model_of_file, load_model
    from quant.release.modelfile import format_modelfile as modelfile
    from quant.release.package import render_modelfile as by_recipe

    if model is None:
        for folder in first.resolve().parents[:2]:
            if (folder / "params").is_file():
                system = folder / "system"
                return modelfile(
                    out.name,
                    _params(folder / "params"),
                    system.read_text() if system.is_file() else None,
                )
    if not (named := model or find_model_of_file(first.name)):
        raise InputError(
            f"{first.name}: expected the name of a model's file, found another; say --model, for its parameters"
        )
    return by_recipe(load_model(named)[0], out.name)


def _params(path: Path) -> dict[str, object]:
    from quant.errors import InputError, raise_problems
    from quant.release.ollama import params_problems

    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    if not isinstance(told, dict):
        raise InputError(f"{path}: expected an object, found {told!r:.80}")
    raise_problems(params_problems(told, str(path)))
    return told
