"""The command that measures files against their base."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.cli import progress, tables
from quant.cli.options import FILE, FOLDER, json_option, quant, tools_option
from quant.core.format import human_bytes
from quant.errors import InputError

if TYPE_CHECKING:
    from quant.calibration.text import CalibrationText
    from quant.core.store import Store
    from quant.evaluate.compare import Evaluation
    from quant.llama.toolchain import Toolchain

CONTEXT = 512
"""Tokens in a chunk of a probe."""

text_option = click.option(
    "--text",
    "texts",
    type=FILE,
    multiple=True,
    help="A text instead of a set; its name is its domain.",
)
chunks_option = click.option(
    "--chunks", type=click.IntRange(1), help="Of each text at most.  [all]"
)
threads_option = click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
reading_work = click.option(
    "--work", type=FOLDER, envvar="QUANT_WORK", help="Where readings are kept.  [a passing folder]"
)


@quant.command()
@click.argument("base", type=FILE)
@click.argument("paths", type=FILE, nargs=-1, required=True)
@click.option(
    "--calibration",
    default="embedded",
    show_default=True,
    metavar="SET",
    help="The set whose held-out part is read.",
)
@click.option(
    "--context", type=click.IntRange(32), default=512, show_default=True, help="Tokens in a chunk."
)
@click.option(
    "--peer",
    "peers",
    type=FILE,
    multiple=True,
    help="A file to compare with, drawn by another mark; repeatable.",
)
@click.option(
    "--html", type=FILE, help="Write a page with the table and the pictures; it needs no network."
)
@text_option
@chunks_option
@threads_option
@reading_work
@tools_option
@json_option
def evaluate(
    base: Path,
    paths: tuple[Path, ...],
    calibration: str,
    context: int,
    texts: tuple[Path, ...],
    chunks: int | None,
    threads: int,
    work: Path | None,
    llama_cpp: Path | None,
    as_json: bool,
    peers: tuple[Path, ...],
    html: Path | None,
) -> None:
    """How far quantised PATHS are from BASE, their BF16 file: perplexity, KLD and top-1, with 95 % intervals.

    Two files are also compared with each other, chunk by chunk.
    """
    from quant.calibration import held_out
    from quant.core.store import Store
    from quant.evaluate.compare import EvaluationSettings, difference
    from quant.evaluate.compare import evaluate_files as measure
    from quant.llama import toolchain
    from quant.llama.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory(prefix="quant-evaluate-") as passing:
        store = Store((work or Path(passing)).resolve())
        by_domain, left_out = _named(texts), ""
        if not texts:
            tools = toolchain.find_toolchain(llama_cpp)
            text = set_of(calibration, base, context, tools, store)
            held = held_out.split_by_domain(text, context, Tokenizer(base, tools), store)
            by_domain, left_out = dict(held.paths), held_out.left_out(held.too_short)
            if not by_domain:
                raise InputError(
                    f"{calibration}: the set holds too little text out to mean anything; name one with --text"
                )
        if left_out:
            progress.say(left_out)
        found = measure(
            base, [*paths, *peers], by_domain, store, EvaluationSettings(context, chunks, threads)
        )
    if html:
        _write_page(html, base, found, peers, left_out)
    gap = difference(found[0].whole, found[1].whole) if len(found) == 2 else None
    if as_json:
        told: dict[str, Any] = {"base": base.name, "files": [e.json() for e in found]}
        if gap:
            told["difference"] = {"kld_mean": gap.value, "low": gap.low, "high": gap.high}
        return click.echo(json.dumps(told, ensure_ascii=False))
    _show(found)
    if gap:
        sure = "clearly" if gap.low > 0 or gap.high < 0 else "not surely"
        first, second = (e.file.name for e in found)
        click.echo(
            f"{second} less {first}: {gap.value:+.5f} ({gap.low:+.5f} to {gap.high:+.5f}), {sure} apart"
        )
    return None


def _named(texts: tuple[Path, ...]) -> dict[str, Path]:
    if len({t.stem for t in texts}) < len(texts):
        raise InputError("--text: expected texts with different names, for they name the domains")
    return {t.stem: t for t in texts}


def set_of(
    name: str, base: Path, context: int, tools: "Toolchain", store: "Store"
) -> "CalibrationText":
    """A calibration set in the model's own chat format: what may be measured on, and what is held out."""
    from quant.calibration import text as calibrate
    from quant.chat.template import patch_template
    from quant.llama.gguf import read_header
    from quant.llama.model_file import ModelFile
    from quant.plan.recipe import ImatrixRecipe

    found = read_header(base).metadata.get("tokenizer.chat_template")
    template = patch_template(found, None, str(base)) if found else None
    return calibrate.build_set_text(
        ImatrixRecipe(name, context), template, ModelFile.open(base), tools, store
    )


def _write_page(
    html: Path, base: Path, found: "tuple[Evaluation, ...]", peers: tuple[Path, ...], left_out: str
) -> None:
    from quant.core import files
    from quant.evaluate import html as page
    from quant.evaluate.figures import round_figures
    from quant.llama.gguf import read_headers

    names = [e.file.name.removesuffix(".gguf").partition("-00001-of-")[0] for e in found]
    shown = [
        page.ReportData(
            name,
            e.bytes,
            round_figures(e.figures()),
            {t.name: t.type.name for h in read_headers(e.file) for t in h.tensors},
            peer=e.file in peers,
            is_base=e.file == base,
        )
        for name, e in zip(names, found, strict=True)
    ]
    files.write_text(
        html,
        page.render_page(
            shown, base.stem, found[0].figures()["ppl_base"], [left_out] if left_out else []
        ),
    )


def _show(found: "tuple[Evaluation, ...]") -> None:
    columns = (
        "file",
        ">size",
        "domain",
        ">chunks",
        ">PPL",
        ">KLD",
        ">95 %",
        ">median",
        ">99 %",
        ">99.9 %",
        ">max",
        ">top-1",
    )
    rows = []
    for e in found:
        told = e.json()
        domains = told["domains"] if len(told["domains"]) > 1 else {}
        for name, f in {"all": told, **domains}.items():
            first = name == "all"
            rows.append(
                (
                    e.file.name if first else "",
                    human_bytes(e.bytes) if first else "",
                    name,
                    str(f["chunks"]),
                    f"{f['ppl']:.3f}",
                    f"{f['kld_mean']:.5f}",
                    f"{f['kld_mean_low']:.5f} - {f['kld_mean_high']:.5f}",
                    f"{f['kld_median']:.5f}",
                    f"{f['kld_p99']:.4f}",
                    f"{f['kld_p999']:.4f}",
                    f"{f['kld_max']:.3f}",
                    f"{100 * f['top1']:.2f} %",
                )
            )
    tables.show(columns, rows)
