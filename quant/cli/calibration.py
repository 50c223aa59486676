"""The commands about calibration sets: what is in one, and pinning one that comes from the hub."""

import json
from pathlib import Path

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, json_option, quant, tools_option


@quant.group()
def calibration() -> None:
    """Calibration sets: the texts that importance matrices are computed on."""


@calibration.command()
@click.argument("name", metavar="SET")
def lock(name: str) -> None:
    """Pin the hub datasets of SET: write commit, digests and rows beside it. Nothing is built from what is not pinned."""
    from quant.calibration import datasets, sets

    told, folder = sets.find_set(name)
    locked = datasets.lock_datasets(told, folder)
    for source, one in locked.items():
        progress.print_line(
            f"{source}: {one.repo}@{one.revision}, {len(one.files)} files, {one.rows:,} documents"
        )
        if one.left_out:
            progress.print_line(
                f"{source}: {sum(one.left_out.values()):,} left out ({datasets.reasons(one.left_out)})"
            )
    click.echo(datasets.dataset_lock_path(told, folder))


@calibration.command()
@click.argument("name", metavar="SET")
@click.option(
    "--gguf",
    type=FILE,
    help="A model: its tokens and its chat template.  [characters, and no template]",
)
@click.option(
    "--examples",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Texts of each source to print.",
)
@json_option
@tools_option
def show(
    name: str, gguf: Path | None, examples: int, as_json: bool, llama_cpp: Path | None
) -> None:
    """What is in SET: sources, licences, documents and shares, and examples as the model sees them."""
    from quant.calibration import datasets, sets
    from quant.calibration import text as calibrate
    from quant.chat.template import patch_template
    from quant.llama import toolchain
    from quant.llama.tokenizer import CharacterCounter, Tokenizer

    told, folder = sets.find_set(name)
    documents = datasets.read_documents(told, folder, datasets.read_dataset_lock(told, folder))
    counter = Tokenizer(gguf, toolchain.find_toolchain(llama_cpp)) if gguf else CharacterCounter()
    words = (
        counter.header.metadata.get("tokenizer.chat_template")
        if isinstance(counter, Tokenizer)
        else None
    )
    rendered = calibrate.choose_documents(
        told, documents, patch_template(words, None, str(gguf)) if words else None, counter
    )
    about = rendered.json()
    if as_json:
        click.echo(
            json.dumps({"set": told.name, "unit": counter.unit, **about}, ensure_ascii=False)
        )
        return
    rows = [
        (
            s["name"],
            s["kind"],
            s["licence"],
            f"{s['documents']:,}",
            f"{s['tokens']:,}",
            f"{100 * s['share']:.1f} %",
            f"{100 * s['share_wanted']:.1f} %" if "share_wanted" in s else "-",
        )
        for s in about["sources"]
    ]
    columns = ("source", "kind", "licence", ">documents", f">{counter.unit}", ">share", ">wanted")
    tables.print_table(columns, rows, title=f"{told.name}: {told.summary}")
    total = sum(s["tokens"] for s in about["sources"])
    click.echo(
        f"{len(rendered.read):,} documents, {total:,} {counter.unit}; held out: {about['held_out']:,} documents;"
        f" left out as too much like others: {about['near_duplicates']:,}"
    )
    for source in told.source:
        if source.attribution:
            click.echo(f"{source.name}: {source.attribution}")
    for source in told.source if examples else ():
        shown = [
            (d, t)
            for d, t in zip(rendered.read, rendered.texts, strict=True)
            if d.source == source.name
        ]
        for document, text in shown[:examples]:
            click.echo(f"\n--- {source.name}: {document.id}\n{text}")
