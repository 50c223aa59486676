"""The command that says what a release will hold and weigh, before anything is pulled."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from quant.card import human_bytes
from quant.cli import tables
from quant.cli.options import FILE, json_option, quant, variants_option
from quant.errors import InputError
from quant.footprint import GIB, class_of, classes, memory, shard_bytes_of
from quant.header import TensorSpec
from quant.plan import Plan, decisions
from quant.recipe import Model, Variant, load_model, load_variant, shard_bytes


@quant.command()
@click.argument("model")
@variants_option
@click.option("--gguf", type=FILE, help="Its BF16 file, instead of the numbers of the recipe.")
@click.option("--context", type=click.IntRange(1), help="Tokens of context for the memory.  [the recipe's num_ctx]")
@click.option("--explain", metavar="TENSOR", help="Which rule decides this tensor, in each variant.")
@json_option
def plan(
    model: str, variants: tuple[str, ...], gguf: Path | None, context: int | None, explain: str | None, as_json: bool
) -> None:
    """What every file of MODEL's release will hold and weigh; no weights are needed.

    With one --variant: its classes of tensors. With several, or none: a line each.
    """
    from quant.plan import plan as decide

    recipe, path = load_model(model)
    tensors, head, kv_bytes = _tensors(recipe, path, gguf)
    chosen = [load_variant(name) for name in variants or recipe.variants]
    if explain:
        return _explain(chosen, tensors, explain)
    plans = [decide(variant, tensors) for variant in chosen]
    context = context or recipe.ollama.num_ctx
    if as_json:
        return click.echo(json.dumps(_document(recipe, plans, head), ensure_ascii=False))
    if len(plans) == 1:
        _show_classes(plans[0])
    _show_variants(recipe, plans, head, kv_bytes, context)
    base = sum(t.bytes for t in tensors)
    needed = 2 * base + sum(2 * p.bytes for p in plans if not p.is_base)
    click.echo(
        f"{len(tensors):,} tensors, {sum(t.elements for t in tensors):,} weights. A build of these takes about"
        f" {human_bytes(needed)} of disk: weights, BF16 file, every variant whole and in shards."
    )
    return None


def _tensors(recipe: Model, path: Path, gguf: Path | None) -> tuple[tuple[TensorSpec, ...], int, int]:
    """Tensors of the BF16 file, bytes of its head, and bytes of KV cache for a token."""
    from quant.header import read_headers
    from quant.inventory import numbers

    if not recipe.architecture and gguf is None:
        raise InputError(
            f"{path}: architecture: missing, so there is nothing to plan with; name the BF16 file with --gguf"
        )
    told = numbers(recipe.architecture, str(path)) if recipe.architecture else None
    kv_bytes = told.kv_bytes_per_token() if told else 0
    if gguf:
        headers = read_headers(gguf)
        return tuple(t for h in headers for t in h.tensors), headers[0].data_start, kv_bytes
    assert told is not None
    return told.tensors(), recipe.header_bytes, kv_bytes


def _document(recipe: Model, plans: Sequence[Plan], head: int) -> dict[str, Any]:
    return {
        "model": recipe.name,
        "parameters": sum(t.tensor.elements for t in plans[0].tensors),
        "variants": [
            p.json() | {"bytes": p.bytes + head, "shards": _shards(p, recipe)} for p in plans
        ],
    }  # fmt: skip


def _shards(p: Plan, recipe: Model) -> int:
    return len(shard_bytes_of(p, shard_bytes(recipe.max_shard_size))) if p.variant.split else 1


def _show_variants(recipe: Model, plans: Sequence[Plan], head: int, kv_bytes: int, context: int) -> None:
    rows = []
    for p in plans:
        needs = memory(p, kv_bytes, context)
        split = f"{needs.without_experts / GIB:.1f} + {needs.experts / GIB:.1f}" if needs.experts else "-"
        size = p.bytes + head
        rows.append(
            (p.variant.name, f"{size:,}", human_bytes(size), f"{p.bits_per_weight:.3f}", str(_shards(p, recipe)),
             f"{needs.whole / GIB:.1f}", split)
        )  # fmt: skip
    columns = ("variant", ">bytes", ">size", ">bits/weight", ">files", f">GiB at {context:,}", ">GiB: rest + experts")
    tables.show(columns, rows, title=f"{recipe.title}, shards of {recipe.max_shard_size}")


def _show_classes(p: Plan) -> None:
    total = sum(t.bytes for t in p.tensors)
    rows = [
        (c.name, str(c.count), c.type, f"{c.bytes:,}", f"{100 * c.bytes / total:.1f} %")
        for c in sorted(classes(p), key=lambda c: -c.bytes)
    ]
    tables.show(("class", ">tensors", "type", ">bytes", ">share"), rows, title=p.variant.name)


def _explain(variants: Sequence[Variant], tensors: Sequence[TensorSpec], name: str) -> None:
    """For one tensor, the rule of each variant that decides it."""
    found = [t for t in tensors if t.name == name]
    if not found:
        from quant.errors import nearest

        raise InputError(f"tensor {name!r} is not in this model: {nearest(name, [t.name for t in tensors])}")
    rows = []
    for variant in variants:
        n = decisions(variant, tensors).get(name) if variant.rules else None
        rule = variant.rules[n] if n is not None else None
        rows.append(
            (variant.name, f"rules[{n}] of {variant.name}.toml", rule.type, rule.tensors, rule.why)
            if rule
            else (variant.name, "no rule: it keeps its type", found[0].type.name, "", "")
        )
    tables.show(("variant", "decided by", "type", "pattern", "why"), rows, title=f"{name} ({class_of(name)})")
