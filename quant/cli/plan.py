"""The command that shows what a release will contain and weigh, before anything is downloaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from quant.cli import tables
from quant.cli.options import FILE, collect_options, json_option, quant, variants_option
from quant.core.errors import InputError, suggest_name
from quant.core.format import GIB, human_bytes
from quant.llama.gguf import TensorSpec
from quant.llama.tensors import tensor_class
from quant.plan.forecast import ReleasePlan, plan_model
from quant.plan.plan import Plan, choose_type, match_rules
from quant.plan.recipe import Variant
from quant.plan.sizes import summarize_classes


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``quant plan``."""

    model: str
    variants: tuple[str, ...]
    gguf: Path | None
    context: int | None
    explain: str | None
    as_json: bool


@quant.command(short_help="Show types and sizes of a release.")
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
    release = plan_model(options.model, options.variants, options.gguf)
    if options.explain:
        _explain(release, options)
        return
    plans = release.plans
    if options.as_json:
        click.echo(json.dumps(release.json(), ensure_ascii=False))
        return
    if len(plans) == 1:
        _show_classes(plans[0])
    _show_variants(release, options.context or release.model.ollama.num_ctx)
    weights = sum(t.elements for t in release.tensors)
    click.echo(
        f"{len(release.tensors):,} tensors, {weights:,} weights. A build of these takes about"
        f" {human_bytes(release.disk_bytes)} of disk: downloaded weights, BF16 file, every variant."
    )


def _show_variants(release: ReleasePlan, context: int) -> None:
    rows = []
    for p in release.plans:
        memory, size = release.estimate_memory(p, context), release.forecast_bytes(p)
        # Experts may stay in main memory (llama.cpp's --n-cpu-moe), so their part is shown apart.
        split = f"{memory.without_experts / GIB:.1f} + {memory.experts / GIB:.1f}"
        rows.append(
            (
                p.variant.name,
                f"{size:,}",
                human_bytes(size),
                f"{p.bits_per_weight:.3f}",
                str(release.count_shards(p)),
                f"{memory.whole / GIB:.1f}",
                split if memory.experts else "-",
            )
        )
    memory_columns = (f">GiB at {context:,}", ">GiB: rest + experts")
    columns = ("variant", ">bytes", ">size", ">bits/weight", ">files", *memory_columns)
    title = f"{release.model.title}, shards of {release.model.max_shard_size}"
    tables.print_table(columns, rows, title=title)


def _show_classes(plan: Plan) -> None:
    total = sum(t.bytes for t in plan.tensors)
    rows = [
        (c.name, str(c.count), c.type, f"{c.bytes:,}", f"{100 * c.bytes / total:.1f} %")
        for c in sorted(summarize_classes(plan), key=lambda c: -c.bytes)
    ]
    tables.print_table(
        ("class", ">tensors", "type", ">bytes", ">share"), rows, title=plan.variant.name
    )


def _explain(release: ReleasePlan, options: PlanOptions) -> None:
    """Print which rule of each variant decides the tensor that ``--explain`` names."""
    name, tensors = str(options.explain), release.tensors
    tensor = next((t for t in tensors if t.name == name), None)
    if tensor is None:
        suggestion = _suggest_tensor(name, tensors)
        raise InputError(f"tensor {name!r} is not in this model: {suggestion}")
    rows = [_explain_variant(variant, tensor, tensors) for variant in release.variants]
    if options.as_json:
        keys = ("variant", "rule", "type", "pattern", "why")
        decisions = [dict(zip(keys, row, strict=True)) for row in rows]
        document = {"model": release.model.name, "tensor": name, "variants": decisions}
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
    # Reversed: of each class the first block's name stays.
    by_class = {tensor_class(t.name): t.name for t in reversed(tensors)}
    if tensor_class(name) in by_class:
        return suggest_name(name, [t.name for t in tensors])
    return suggest_name(name, by_class.values())
