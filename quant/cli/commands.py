"""Every command of ``quant``. A command imports what it needs when it runs, so that `quant --help` stays quick."""

import json
from pathlib import Path
from typing import Any

import click

from quant.cli import progress, tables

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
variants_option = click.option(
    "--variant", "-v", "variants", multiple=True, metavar="V", help="Only this one; repeatable."
)
work_option = click.option(
    "--work", type=FOLDER, envvar="QUANT_WORK", help="Where finished stages are kept.  [OUT/.work]"
)
tools_option = click.option("--llama-cpp", type=FOLDER, help="A llama.cpp of your own.  [$QUANT_LLAMA_CPP]")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gguf-foundry")
def quant() -> None:
    """From a model's BF16 weights on the hub to a tested GGUF release."""


@quant.command()
@click.option("--out", "-o", type=FOLDER, default=Path("release"), show_default=True, help="Where the release goes.")
@variants_option
@work_option
@tools_option
def demo(out: Path, variants: tuple[str, ...], work: Path | None, llama_cpp: Path | None) -> None:
    """The whole way, on the tiny model that the project ships: a few minutes, no download."""
    _build("tiny-glm", variants, out, work, None, llama_cpp)


@quant.command()
@click.argument("model")
@click.option("--out", "-o", type=FOLDER, required=True, help="Where the release goes.")
@click.option("--revision", metavar="COMMIT", help="The commit of the hub repo, if the recipe does not pin it.")
@variants_option
@work_option
@tools_option
def build(
    model: str, out: Path, revision: str | None, variants: tuple[str, ...], work: Path | None, llama_cpp: Path | None
) -> None:
    """Build the release of MODEL: a name of recipes/models, or a path to such a file."""
    _build(model, variants, out, work, revision, llama_cpp)


@quant.command()
@click.argument("model")
@click.option("--revision", metavar="COMMIT", help="The commit of the hub repo, if the recipe does not pin it.")
@click.option("--work", type=FOLDER, envvar="QUANT_WORK", default=Path("release/.work"), show_default=True)
def pull(model: str, revision: str | None, work: Path) -> None:
    """Fetch and verify the checkpoint of MODEL; prints its folder."""
    from dataclasses import replace

    from quant import source
    from quant.recipe import load_model
    from quant.store import Store

    recipe, path = load_model(model)
    wanted = replace(recipe.source, revision=revision or recipe.source.revision)
    store = Store(work.expanduser().resolve() / recipe.name)
    with store.alone():
        checkpoint = source.pull(wanted, path.parent, store)
    progress.say(f"{len(checkpoint.receipts)} files, {sum(r.bytes for r in checkpoint.receipts):,} bytes, all verified")
    click.echo(checkpoint.folder)


@quant.command()
@click.argument("gguf", type=FILE)
@json_option
def inspect(gguf: Path, as_json: bool) -> None:
    """What a GGUF file (or the first shard of one) says of itself."""
    from quant.card import human_bytes
    from quant.header import read_headers

    headers = read_headers(gguf)
    tensors = [t for h in headers for t in h.tensors]
    short = {k: v if not isinstance(v, list) else f"[{len(v)} values]" for k, v in headers[0].metadata.items()}
    if as_json:
        rows: list[dict[str, Any]] = [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.bytes} for t in tensors
        ]
        return click.echo(json.dumps({"file": gguf.name, "metadata": short, "tensors": rows}, ensure_ascii=False))
    tables.show(("key", "value"), [(k, _one_line(v)) for k, v in short.items()])
    tables.show(
        ("tensor", "type", ">shape", ">bytes"),
        [(t.name, t.type.name, " x ".join(map(str, t.shape)), f"{t.bytes:,}") for t in tensors],
    )
    elements = sum(t.elements for t in tensors)
    size = sum(t.bytes for t in tensors)
    bpw = 8 * size / max(elements, 1)
    click.echo(f"{len(tensors)} tensors, {elements:,} weights, {human_bytes(size)}, {bpw:.2f} bits per weight")
    return None


@quant.command()
@click.argument("first_shard", type=FILE)
@click.argument("out", type=FILE)
@tools_option
def merge(first_shard: Path, out: Path, llama_cpp: Path | None) -> None:
    """Put the shards beside FIRST_SHARD together as OUT, for programs that take one file (Ollama)."""
    from quant import shard, toolchain

    receipt = shard.merge(first_shard, out, toolchain.find(llama_cpp))
    progress.say(f"{out}: {receipt.bytes:,} bytes, every tensor as it was, sha256 {receipt.sha256}")


@quant.command()
@click.argument("path", type=FILE)
@click.option("--model", default="tiny-glm", show_default=True, help="Whose conversation to hold.")
@click.option("--port", type=click.IntRange(1, 65535), help="A loopback port.  [a free one]")
@json_option
@tools_option
def smoke(path: Path, model: str, port: int | None, as_json: bool, llama_cpp: Path | None) -> None:
    """Talk to a GGUF (or the first shard of one) over several turns; exit 1 when it may not be published."""
    import tempfile

    from quant import toolchain
    from quant.recipe import load_model
    from quant.smoke import try_file

    recipe, _ = load_model(model)
    with tempfile.TemporaryDirectory(prefix="quant-smoke-") as folder:
        verdict = try_file(
            path.resolve(),
            recipe.smoke,
            toolchain.find(llama_cpp),
            Path(folder),
            max_answer=recipe.max_answer,
            port=port,
        )
    if as_json:
        click.echo(json.dumps(verdict.json(), ensure_ascii=False))
    else:
        for exchange in verdict.transcript:
            click.echo(f"{'+' if exchange.thinking else '-'} {exchange.question}\n    {_one_line(exchange.answer)}")
        tables.show(
            ("scenario", "kind", "verdict"),
            [(s.name, s.kind, "passed" if s.passed else f"FAILED: {s.detail}") for s in verdict.scenarios],
        )
    raise SystemExit(0 if verdict.passed else 1)


@quant.command()
@tools_option
def doctor(llama_cpp: Path | None) -> None:
    """What the work needs, what is here, and how to get what is missing; exit 2 when something is."""
    from quant.cli.doctor import examine

    findings = examine(llama_cpp)
    tables.show(("", "what", "version", "where, or how to get it"), [f.row for f in findings])
    raise SystemExit(0 if all(f.ok for f in findings) else 2)


def _build(
    model: str, variants: tuple[str, ...], out: Path, work: Path | None, revision: str | None, llama_cpp: Path | None
) -> None:
    import time

    from quant import build as builds
    from quant.package import variants_table

    began = time.monotonic()
    job = builds.prepare(model, variants, out=out, work=work, revision=revision, llama_cpp=llama_cpp)
    with progress.shown(job.steps) as do:
        built = builds.build(job, do)
    tables.show(("variant", ">bytes", ">bits/weight", ">files", "smoke test"), variants_table(built.release.manifest))
    click.echo(f"{built.folder}")
    if built.fresh:
        progress.say(f"done in {time.monotonic() - began:.0f} s")
    else:
        progress.say("nothing to do: this release stands already, made of the same inputs")


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 110 else f"{text[:107]}..."
