"""The command that shows what a release will contain and weigh, before anything is downloaded."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import click

from quant.cli import tables
from quant.cli.options import FILE, collect_options, json_option, quant, variants_option
from quant.core.format import GIB, human_bytes
from quant.errors import InputError, raise_problems, suggest_name
from quant.llama.gguf import Header, TensorSpec
from quant.llama.tensors import tensor_class
from quant.plan.load import load_model, load_variant
from quant.plan.plan import (
    Plan,
    choose_type,
    compute_depths,
    find_plan_problems,
    make_plan,
    match_rules,
)
from quant.plan.recipe import ModelRecipe, Variant, parse_size
from quant.plan.sizes import (
    estimate_build_bytes,
    estimate_memory,
    find_oversized,
    forecast_file_bytes,
    forecast_shard_bytes,
    summarize_classes,
)

T = TypeVar("T")
UNQUANTIZED = {"BF16", "F16", "F32"}


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``quant plan``."""

    model: str
    variants: tuple[str, ...]
    gguf: Path | None
    context: int | None
    explain: str | None
    as_json: bool


@quant.command()
@click.argument("model")
@variants_option
@click.option(
    "--gguf",
    type=FILE,
    help="The model's BF16 file, instead of the recipe's [architecture]: sizes to the byte.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Context length in tokens, for the memory.  [the recipe's num_ctx]",
)
@click.option(
    "--explain", metavar="TENSOR", help="Show the rule that decides this tensor, in each variant."
)
@json_option
@collect_options(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Show what every file of MODEL's release will contain and weigh; no weights are needed.

    One --variant shows its classes of tensors. Several, or none, show a line for each variant.
    """
    recipe, path, variants = _load_recipes(options.model, options.variants)
    gguf = options.gguf
    source = _read_gguf(recipe, gguf) if gguf else _read_architecture(recipe, path)
    if options.explain:
        _explain(recipe, variants, source.tensors, options)
        return
    raise_problems(p for v in variants for p in find_plan_problems(v, source.tensors, None))
    plans = [make_plan(variant, source.tensors) for variant in variants]
    oversized = (find_oversized(p, recipe.max_shard_size) for p in plans)
    raise_problems(chain.from_iterable(oversized))
    if options.as_json:
        click.echo(json.dumps(_make_document(recipe, plans, source), ensure_ascii=False))
        return
    if len(plans) == 1:
        _show_classes(plans[0])
    _show_variants(recipe, plans, source, options.context or recipe.ollama.num_ctx)
    needed = human_bytes(estimate_build_bytes(source.tensors, plans, recipe))
    weights = sum(t.elements for t in source.tensors)
    click.echo(
        f"{len(source.tensors):,} tensors, {weights:,} weights. A build of these takes about"
        f" {needed} of disk: downloaded weights, BF16 file, every variant."
    )


@dataclass(frozen=True)
class _PlanSource:
    """What plans are made from."""

    tensors: tuple[TensorSpec, ...]
    kv_bytes: int
    """Bytes of KV cache for one token of context."""
    header_bytes: int
    """Bytes of a file's head, about: as the recipe states it."""
    base: Header | None = None
    """Head of the BF16 file, with which forecasts are exact."""

    def forecast_bytes(self, plan: Plan) -> int:
        """Return the length of a variant's whole file in bytes."""
        if self.base:
            return forecast_file_bytes(plan, self.base)
        return plan.bytes + self.header_bytes


def _load_recipes(model: str, variants: Sequence[str]) -> tuple[ModelRecipe, Path, list[Variant]]:
    """Return the named recipes. Raise one InputError with everything that is wrong in any."""
    problems: list[str] = []

    def collect(load: Callable[[str], T], name: str) -> T | None:
        try:
            return load(name)
        except InputError as e:
            problems.extend(e.problems)
            return None

    loaded = collect(load_model, model)
    names = variants or (loaded[0].variants if loaded else ())
    chosen = [v for name in dict.fromkeys(names) if (v := collect(load_variant, name))]
    raise_problems(problems)
    assert loaded is not None
    return *loaded, chosen


def _read_architecture(recipe: ModelRecipe, path: Path) -> _PlanSource:
    from quant.plan.inventory import read_architecture

    if not recipe.architecture:
        raise InputError(
            f"{path}: architecture: missing, so there is nothing to plan with;"
            " name the BF16 file with --gguf"
        )
    architecture = read_architecture(recipe.architecture, f"{path}: architecture")
    return _PlanSource(
        tensors=architecture.tensors(),
        kv_bytes=architecture.kv_bytes_per_token(),
        header_bytes=recipe.header_bytes,
    )


def _read_gguf(recipe: ModelRecipe, gguf: Path) -> _PlanSource:
    from quant.llama.gguf import read_headers
    from quant.plan.inventory import read_architecture
    from quant.plan.sizes import read_kv_cache

    headers = read_headers(gguf)
    tensors = tuple(t for h in headers for t in h.tensors)
    architecture = read_architecture(recipe.architecture) if recipe.architecture else None
    expected = architecture.tensors() if architecture else ()
    raise_problems(_find_gguf_problems(recipe, gguf, tensors, expected))
    kv_cache = architecture.kv_cache() if architecture else read_kv_cache(headers[0].metadata)
    return _PlanSource(
        tensors=tensors,
        kv_bytes=kv_cache.bytes_per_token,
        header_bytes=headers[0].data_start,
        base=headers[0] if len(headers) == 1 else None,
    )


def _find_gguf_problems(
    recipe: ModelRecipe,
    gguf: Path,
    tensors: Sequence[TensorSpec],
    expected: Sequence[TensorSpec],
) -> Iterator[str]:
    """Yield why this is not the model's BF16 file.

    MTP blocks may differ, because config.json does not state all of their tensors.
    """
    if quantized := {t.type.name for t in tensors} - UNQUANTIZED:
        names = ", ".join(sorted(quantized))
        yield f"{gguf}: expected unquantized weights (BF16), found {names}"
    shapes, depths = {t.name: t.shape for t in tensors}, compute_depths(expected)
    trunk = [t for t in expected if depths.get(t.name, 0) < 1]
    if wrong := [t for t in trunk if shapes.get(t.name) != t.shape]:
        first = wrong[0]
        yield (
            f"{gguf}: differs from {recipe.title}'s recipe: {len(wrong):,} of {len(trunk):,}"
            f" tensors, first {first.name}: expected {first.shape},"
            f" found {shapes.get(first.name)}"
        )


def _make_document(
    recipe: ModelRecipe, plans: Sequence[Plan], source: _PlanSource
) -> dict[str, Any]:
    return {
        "model": recipe.name,
        "parameters": sum(t.tensor.elements for t in plans[0].tensors),
        "variants": [
            p.json() | {"bytes": source.forecast_bytes(p), "shards": _count_shards(p, recipe)}
            for p in plans
        ],
    }


def _count_shards(plan: Plan, recipe: ModelRecipe) -> int:
    if not plan.variant.split:
        return 1
    return len(forecast_shard_bytes(plan, parse_size(recipe.max_shard_size)))


def _show_variants(
    recipe: ModelRecipe, plans: Sequence[Plan], source: _PlanSource, context: int
) -> None:
    rows = []
    for p in plans:
        memory, size = estimate_memory(p, source.kv_bytes, context), source.forecast_bytes(p)
        split = f"{memory.without_experts / GIB:.1f} + {memory.experts / GIB:.1f}"
        rows.append(
            (
                p.variant.name,
                f"{size:,}",
                human_bytes(size),
                f"{p.bits_per_weight:.3f}",
                str(_count_shards(p, recipe)),
                f"{memory.whole / GIB:.1f}",
                split if memory.experts else "-",
            )
        )
    memory_columns = (f">GiB at {context:,}", ">GiB: rest + experts")
    columns = ("variant", ">bytes", ">size", ">bits/weight", ">files", *memory_columns)
    tables.print_table(columns, rows, title=f"{recipe.title}, shards of {recipe.max_shard_size}")


def _show_classes(plan: Plan) -> None:
    total = sum(t.bytes for t in plan.tensors)
    rows = [
        (c.name, str(c.count), c.type, f"{c.bytes:,}", f"{100 * c.bytes / total:.1f} %")
        for c in sorted(summarize_classes(plan), key=lambda c: -c.bytes)
    ]
    tables.print_table(
        ("class", ">tensors", "type", ">bytes", ">share"), rows, title=plan.variant.name
    )


def _explain(
    recipe: ModelRecipe,
    variants: Sequence[Variant],
    tensors: Sequence[TensorSpec],
    options: PlanOptions,
) -> None:
    """Print which rule of each variant decides the tensor that ``--explain`` names."""
    name = str(options.explain)
    tensor = next((t for t in tensors if t.name == name), None)
    if tensor is None:
        suggestion = _suggest_tensor(name, tensors)
        raise InputError(f"tensor {name!r} is not in this model: {suggestion}")
    rows = [_explain_variant(variant, tensor, tensors) for variant in variants]
    if options.as_json:
        keys = ("variant", "rule", "type", "pattern", "why")
        decisions = [dict(zip(keys, row, strict=True)) for row in rows]
        document = {"model": recipe.name, "tensor": name, "variants": decisions}
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    columns = ("variant", "decided by", "type", "pattern", "why")
    tables.print_table(columns, rows, title=f"{name} ({tensor_class(name)})")


def _explain_variant(
    variant: Variant, tensor: TensorSpec, tensors: Sequence[TensorSpec]
) -> tuple[str, str, str, str, str]:
    """Return variant, rule, type, pattern and reason for a tensor."""
    n = match_rules(variant, tensors).get(tensor.name) if variant.rules else None
    if n is None:
        return variant.name, "no rule: it keeps its type", tensor.type.name, "", ""
    rule = variant.rules[n]
    return variant.name, f"rules[{n}]", choose_type(rule, tensor).name, rule.tensors, rule.why


def _suggest_tensor(name: str, tensors: Sequence[TensorSpec]) -> str:
    """Suggest a tensor's name; for an unknown class, names of one block, as there are thousands."""
    by_class = {tensor_class(t.name): t.name for t in reversed(tensors)}
    if tensor_class(name) in by_class:
        return suggest_name(name, [t.name for t in tensors])
    return suggest_name(name, by_class.values())
