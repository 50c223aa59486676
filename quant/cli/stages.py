"""The commands that do one stage on files that are already there."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click

from quant.cli import progress
from quant.cli.options import (
    FILE,
    FOLDER,
    collect_options,
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


@quant.command(short_help="Convert a checkpoint to a BF16 GGUF.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=FILE, required=True, help="The GGUF to write.")
@click.option(
    "--model", help="The recipe with template patch and metadata.  [none: converted as it is]"
)
@click.option(
    "--pre",
    help="llama.cpp's name of the pre-tokenizer, if the converter does not know it (glm4).",
)
@click.option("--vision", is_flag=True, help="Convert its vision part instead, to F16 (mmproj).")
def convert(checkpoint: Path, out: Path, model: str | None, pre: str | None, vision: bool) -> None:
    """Convert the checkpoint in a folder to one BF16 GGUF."""
    from quant.build import apply_template_patch
    from quant.core import files
    from quant.core.errors import InputError
    from quant.hub.checkpoint import read_checkpoint
    from quant.llama.convert import FileMetadata, has_vision, write_base, write_vision
    from quant.plan.load import load_model
    from quant.release.metadata import make_file_metadata

    recipe = load_model(model)[0] if model else None
    # Without a recipe the file's name is the title, less what the converter's names add to it.
    stem = out.stem.removeprefix("mmproj-").removesuffix("-F16").removesuffix("-BF16")
    metadata = make_file_metadata(recipe) if recipe else FileMetadata(stem, {})
    metadata = replace(metadata, pre_tokenizer=pre or metadata.pre_tokenizer)
    source = read_checkpoint(checkpoint.resolve())
    if vision and not has_vision(source):
        raise InputError(
            f"{checkpoint}/config.json: vision_config: missing; this model has no vision part"
        )
    template = apply_template_patch(recipe.template if recipe else "none", source)
    # A conversion of hundreds of gigabytes takes hours; OUT appears when it is complete.
    with files.temp_folder(require_absent(out)) as folder:
        partial_file = folder / out.name
        if vision:
            facts = write_vision(source, metadata, partial_file)
        else:
            facts = write_base(source, template.text if template else None, metadata, partial_file)
        files.replace_atomically(partial_file, out)
    progress.print_line(f"{out}: {facts['tensors']} tensors, {facts['parameters']:,} weights")


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of `quant quantize`."""

    base: Path
    imatrix: Path | None
    hessians: Path | None
    out: Path
    tensor_types: Path | None
    max_size: str | None
    jobs: int | None
    memory: int | None
    variants: tuple[str, ...]
    llama_cpp: Path | None


@quant.command(short_help="Quantize a BF16 GGUF into variants.")
@click.argument("base", type=FILE)
@click.option(
    "--imatrix", type=FILE, help="The importance matrix of BASE.  [none: types that need none]"
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
    help="Split the files into shards of at most 50G, 500M ...  [whole files]",
)
@jobs_option
@memory_option
@variants_option
@tools_option
@collect_options(QuantizeOptions)
def quantize(options: QuantizeOptions) -> None:
    """Quantize BASE, a BF16 GGUF, into all variants in one pass.

    A variant is a name in recipes/variants, or the path of such a file. An interrupted run
    continues when it is called again. Beside each file, NAME.gguf.json records the type, the sha256
    and the relative weighted mean squared error of every tensor.
    """
    from quant.plan.load import load_variant, read_type_file
    from quant.quantize.standalone import QuantizeRequest, quantize_model

    # For its usage error only: the request takes the text.
    parse_size_option(options.max_size)
    # Both choose a type for every tensor, and neither can be a default.
    if bool(options.tensor_types) == bool(options.variants):
        raise click.UsageError("expected --variant or --tensor-types, and not both")
    variants = [load_variant(v) for v in options.variants]
    if options.tensor_types:
        variants = [read_type_file(options.tensor_types)]
    request = QuantizeRequest(
        base=options.base,
        variants=variants,
        out=options.out,
        imatrix=options.imatrix,
        hessians=options.hessians,
        max_size=options.max_size,
        settings=make_engine_settings(options.jobs, options.memory),
        llama_cpp=options.llama_cpp,
    )
    with progress.show_progress(1) as run_stage:
        written = run_stage("quantize", request.stem, partial(quantize_model, request))
    for variant in written:
        more = f" and {len(variant.paths) - 1} more" if len(variant.paths) > 1 else ""
        length = sum(p.stat().st_size for p in variant.paths)
        bpw = variant.plan.bits_per_weight
        progress.print_line(
            f"{variant.paths[0]}{more}: {length:,} bytes, {bpw:.2f} bits per weight"
        )


@quant.command(short_help="Split a GGUF into shards.")
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
    """Split GGUF into shards, and compare every tensor with the original."""
    from quant.core import files
    from quant.llama.toolchain import find_toolchain
    from quant.plan.recipe import SIZE
    from quant.quantize.shard import split_file

    if not SIZE.fullmatch(max_size):
        raise click.UsageError(f"--max-size: expected a size like 50G or 500M, found {max_size!r}")
    with files.temp_folder(out / gguf.stem) as folder:
        split_file(gguf.resolve(), max_size, find_toolchain(llama_cpp), folder / gguf.stem)
        for partial_file in sorted(folder.glob("*.gguf")):
            # The names are known only now: they contain the number of shards.
            final = require_absent(out / partial_file.name)
            files.replace_atomically(partial_file, final)
            progress.print_line(str(final))
