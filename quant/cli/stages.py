"""The commands that do one stage on files that are already there."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from quant.cli import progress
from quant.cli.options import (
    FILE,
    FOLDER,
    hessians_option,
    jobs_option,
    make_engine_settings,
    memory_option,
    parse_size_option,
    quant,
    require_absent,
    tools_option,
    variants_option,
)
from quant.core.format import to_canonical_json


@quant.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=FILE, required=True, help="The GGUF to write.")
@click.option(
    "--model", help="Whose recipe says template patch and metadata.  [none: converted as it is]"
)
@click.option(
    "--pre",
    help="llama.cpp's name of the pre-tokenizer, where the converter does not know it (glm4).",
)
@click.option("--vision", is_flag=True, help="Its vision part instead, in F16 (mmproj).")
def convert(checkpoint: Path, out: Path, model: str | None, pre: str | None, vision: bool) -> None:
    """Convert the checkpoint in a folder to one BF16 GGUF."""
    from quant.build import patched_template
    from quant.core import files
    from quant.errors import InputError
    from quant.hub import checkpoint as source
    from quant.llama.convert import FileMetadata, has_vision, write_base, write_vision
    from quant.plan.load import load_model
    from quant.release.metadata import make_file_metadata

    recipe = load_model(model)[0] if model else None
    stem = out.stem.removeprefix("mmproj-").removesuffix("-F16").removesuffix("-BF16")
    said = make_file_metadata(recipe) if recipe else FileMetadata(stem, {})
    said = replace(said, pre_tokenizer=pre or said.pre_tokenizer)
    found = source.read_checkpoint(checkpoint.resolve())
    if vision and not has_vision(found):
        raise InputError(
            f"{checkpoint}/config.json: vision_config: missing; this model has no vision part"
        )
    template = patched_template(recipe.template if recipe else "none", found)
    with files.temp_folder(require_absent(out)) as folder:
        made = folder / out.name
        facts = (
            write_vision(found, said, made)
            if vision
            else write_base(found, template.text if template else None, said, made)
        )
        files.replace_atomically(made, out)
    progress.print_line(f"{out}: {facts['tensors']} tensors, {facts['parameters']:,} weights")


@quant.command()
@click.argument("base", type=FILE)
@click.option(
    "--imatrix", "matrix", type=FILE, help="Its importance matrix.  [none: types that need none]"
)
@hessians_option
@click.option("--out", "-o", type=FOLDER, required=True, help="The folder for the files.")
@click.option(
    "--tensor-types",
    type=FILE,
    help="Lines `REGEX=type` for whole names, first match wins; instead of -v.",
)
@click.option(
    "--max-size",
    metavar="SIZE",
    help="Cut the files into shards of at most 50G, 500M ...  [whole files]",
)
@jobs_option
@memory_option
@variants_option
@tools_option
def quantize(
    base: Path,
    matrix: Path | None,
    hessians: Path | None,
    out: Path,
    tensor_types: Path | None,
    max_size: str | None,
    jobs: int | None,
    memory: int | None,
    variants: tuple[str, ...],
    llama_cpp: Path | None,
) -> None:
    """Quantise BASE, a BF16 GGUF, into all variants in one pass: names of recipes/variants or paths to such files.

    A run that was ended continues when it is called again. Beside each file, NAME.gguf.json says what every tensor is: its
    type, its sha256, and the share of its weighted squares that was lost.
    """
    from quant.calibration import imatrix as matrices
    from quant.calibration.hessian_file import Hessians
    from quant.core import files
    from quant.core.store import Store
    from quant.errors import InputError, raise_problems
    from quant.llama import toolchain
    from quant.llama.gguf import read_header
    from quant.plan.load import load_variant, read_type_file
    from quant.plan.plan import make_plan
    from quant.quantize.gptq import REVISION
    from quant.quantize.variants import QuantizeTarget, is_written, write_variants

    parse_size_option(max_size)
    chosen = [read_type_file(tensor_types)] if tensor_types else [load_variant(v) for v in variants]
    if not chosen or (tensor_types and variants):
        raise click.UsageError("expected --variant or --tensor-types, and not both")
    if bases := [v.name for v in chosen if v.is_base]:
        raise InputError(
            f"variant {bases[0]}: expected rules to quantise by, found none; that is {base} itself"
        )
    header = read_header(base)
    if header.metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{base}: expected the whole file, found a shard of one; `quant merge` puts it together"
        )
    covered = matrices.read_imatrix(matrix, header.tensors).covered if matrix else ()
    plans = [make_plan(v, header.tensors, covered) for v in chosen]
    stem = base.stem.removesuffix("-BF16")
    targets = [
        QuantizeTarget(p, out.resolve() / f"{stem}-{p.variant.name}.gguf", max_size) for p in plans
    ]
    if hessians:
        Hessians.open(hessians, files.hash_file(base))
    seen = [p.resolve().stat() for p in (base, matrix, hessians) if p]
    how = [REVISION] if hessians else []
    identity = to_canonical_json(
        [*how, *((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in seen)]
    )
    raise_problems(
        f"{there}: exists already; name another folder or take it away"
        for t in targets
        if not is_written(t, identity)
        for there in (
            *t.path.parent.glob(t.path.name),
            *t.path.parent.glob(f"{t.path.stem}-*-of-*.gguf"),
        )
    )
    tools = toolchain.find_toolchain(llama_cpp)
    work = Store(out.resolve() / ".quantize")
    pass_over = partial(
        write_variants,
        base.resolve(),
        matrix and matrix.resolve(),
        targets,
        identity,
        tools,
        work.root,
        make_engine_settings(jobs, memory),
        moments=hessians and hessians.resolve(),
    )
    with work.lock(), progress.show_progress(1) as do:
        written = do("quantize", stem, pass_over)
    files.remove(work.root)
    for t, facts in zip(targets, written, strict=True):
        paths = [t.path.with_name(name) for name in facts["files"]]
        more = f" and {len(paths) - 1} more" if paths[1:] else ""
        whole = sum(p.stat().st_size for p in paths)
        progress.print_line(
            f"{paths[0]}{more}: {whole:,} bytes, {t.plan.bits_per_weight:.2f} bits per weight"
        )


@quant.command()
@click.argument("gguf", type=FILE)
@click.option("--out", "-o", type=FOLDER, required=True, help="The folder for the shards.")
@click.option(
    "--max-size",
    default="50G",
    show_default=True,
    help="The largest shard: 50G is 50 * 10^9 bytes, 500M ...",
)
@tools_option
def shard(gguf: Path, out: Path, max_size: str, llama_cpp: Path | None) -> None:
    """Cut GGUF into shards, and compare every tensor with what it was."""
    from quant.core import files
    from quant.llama import toolchain
    from quant.plan.recipe import SIZE
    from quant.quantize.shard import split_file

    if not SIZE.fullmatch(max_size):
        raise click.UsageError(f"--max-size: expected a size like 50G or 500M, found {max_size!r}")
    with files.temp_folder(out / gguf.stem) as folder:
        split_file(
            gguf.resolve(), max_size, toolchain.find_toolchain(llama_cpp), folder / gguf.stem
        )
        for made in sorted(folder.glob("*.gguf")):
            files.replace_atomically(made, require_absent(out / made.name))
            progress.print_line(str(out / made.name))
