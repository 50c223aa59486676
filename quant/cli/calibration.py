"""The commands about calibration sets: show what is in one, and lock its datasets."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, json_option, quant, tools_option

if TYPE_CHECKING:
    from quant.calibration.text import RenderedSet


@quant.group(short_help="Calibration sets: lock one, show one.")
def calibration() -> None:
    """Calibration sets: the texts that importance matrices are computed on."""


@calibration.command()
@click.argument("name", metavar="SET")
def lock(name: str) -> None:
    """Lock the hub datasets of SET: write their commits and digests beside it.

    A calibration text is built from locked datasets only.
    """
    from quant.calibration import datasets, sets

    calibration_set, folder = sets.find_set(name)
    for source, pin in datasets.lock_datasets(calibration_set, folder).items():
        progress.print_line(
            f"{source}: {pin.repo}@{pin.revision}, {len(pin.files)} files, {pin.rows:,} documents"
        )
        if pin.left_out:
            count, reasons = sum(pin.left_out.values()), datasets.format_reasons(pin.left_out)
            progress.print_line(f"{source}: {count:,} left out ({reasons})")
    click.echo(datasets.dataset_lock_path(calibration_set, folder))


@calibration.command()
@click.argument("name", metavar="SET")
@click.option(
    "--gguf",
    type=FILE,
    help="A model: count its tokens, and use its chat template.  [count characters, no template]",
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
    """Show what is in SET: sources, licenses, documents, shares, and rendered texts."""
    from quant.calibration import datasets, sets
    from quant.calibration.text import render_set
    from quant.chat.template import patch_template
    from quant.llama import toolchain
    from quant.llama.model_file import ModelFile
    from quant.llama.tokenizer import CharacterCounter, Tokenizer

    calibration_set, folder = sets.find_set(name)
    lock = datasets.read_dataset_lock(calibration_set, folder)
    documents = datasets.read_documents(calibration_set, folder, lock)
    template = None
    # Without a model there is no tokenizer. Shares by characters still show what a set is made of.
    counter: Tokenizer | CharacterCounter = CharacterCounter()
    if gguf:
        counter = Tokenizer(ModelFile.open(gguf), toolchain.find_toolchain(llama_cpp))
        if text := counter.file.metadata.get("tokenizer.chat_template"):
            # A finished GGUF has its template, with any patch applied already.
            template = patch_template(text, None, str(gguf))
    rendered = render_set(calibration_set, documents, template, counter)
    facts = rendered.json()
    if as_json:
        # Scripts read `licence`; `license` is the key of the sets.
        sources = [source | {"license": source["licence"]} for source in facts["sources"]]
        document = {"set": calibration_set.name, "unit": counter.unit, **facts, "sources": sources}
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    _print_sources(rendered, facts, counter.unit)
    _print_examples(rendered, examples)


def _print_sources(rendered: "RenderedSet", facts: dict[str, Any], unit: str) -> None:
    rows = [
        (
            source["name"],
            source["kind"],
            source["licence"],
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{100 * source['share']:.1f} %",
            f"{100 * source['share_wanted']:.1f} %" if "share_wanted" in source else "-",
        )
        for source in facts["sources"]
    ]
    columns = ("source", "kind", "license", ">documents", f">{unit}", ">share", ">wanted")
    calibration_set = rendered.calibration_set
    tables.print_table(columns, rows, title=f"{calibration_set.name}: {calibration_set.summary}")
    total = sum(source["tokens"] for source in facts["sources"])
    click.echo(
        f"{len(rendered.documents):,} documents, {total:,} {unit}; held out:"
        f" {facts['held_out']:,} documents; dropped as near duplicates:"
        f" {facts['near_duplicates']:,}"
    )
    for source in calibration_set.source:
        if source.attribution:
            click.echo(f"{source.name}: {source.attribution}")


def _print_examples(rendered: "RenderedSet", count: int) -> None:
    for source in rendered.calibration_set.source:
        texts = [
            (document, text)
            for document, text in zip(rendered.documents, rendered.texts, strict=True)
            if document.source == source.name
        ]
        for document, text in texts[:count]:
            click.echo(f"\n--- {source.name}: {document.id}\n{text}")
