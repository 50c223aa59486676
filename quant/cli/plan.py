"""The command that says what a release will hold and weigh, before anything is pulled."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from quant.cli import tables
from quant.cli.options import FILE, json_option, quant, variants_option
from quant.core.format import human_bytes
from quant.errors import InputError, raise_problems, suggest_name
from quant.llama.gguf import Header, TensorSpec
from quant.llama.tensors import tensor_class
from quant.plan.load import load_model, load_variant
from quant.plan.plan import Plan, choose_type, compute_depths, match_rules
from quant.plan.recipe import ModelRecipe, Variant, parse_size
from quant.plan.sizes import (
    GIB,
    estimate_build_bytes,
    estimate_memory,
    find_oversized,
    forecast_file_bytes,
    forecast_shard_bytes,
    summarize_classes,
)

T = TypeVar("T")
UNQUANTISED = {"BF16", "F16", "F32"}


@quant.command()
@click.argument("model")
@variants_option
@click.option(
    "--gguf",
    type=FILE,
    help="Its BF16 file, instead of the numbers of the recipe: sizes to the byte.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Tokens of context for the memory.  [the recipe's num_ctx]",
)
@click.option(
    "--explain", metavar="TENSOR", help="Which rule decides this tensor, in each variant."
)
@json_option
def plan(
    model: str,
    variants: tuple[str, ...],
    gguf: Path | None,
    context: int | None,
    explain: str | None,
    as_json: bool,
) -> None:
    """What every file of MODEL's release will hold and weigh; no weights are needed.

    With one --variant: its classes of tensors. With several, or none: a line each.
    """
    from quant.plan.plan import find_plan_problems as problems
    from quant.plan.plan import make_plan as decide

    recipe, path, chosen = _asked(model, variants)
    weights = _from_gguf(recipe, gguf) if gguf else _from_numbers(recipe, path)
    if explain:
        return _explain(recipe, chosen, weights.tensors, explain, as_json)
    raise_problems(
        problem for variant in chosen for problem in problems(variant, weights.tensors, None)
    )
    plans = [decide(variant, weights.tensors) for variant in chosen]
    raise_problems(problem for p in plans for problem in find_oversized(p, recipe.max_shard_size))
    if as_json:
        return click.echo(json.dumps(_document(recipe, plans, weights), ensure_ascii=False))
    if len(plans) == 1:
        _show_classes(plans[0])
    _show_variants(recipe, plans, weights, context or recipe.ollama.num_ctx)
    needed = estimate_build_bytes(weights.tensors, plans, recipe)
    click.echo(
        f"{len(weights.tensors):,} tensors, {sum(t.elements for t in weights.tensors):,} weights. A build of these takes"
        f" about {human_bytes(needed)} of disk: weights that are fetched, BF16 file, every variant."
    )
    return None


@dataclass(frozen=True)
class _Weights:
    """What is planned with."""

    tensors: tuple[TensorSpec, ...]
    kv_bytes: int
    """KV cache for a token of context."""
    header_bytes: int
    """Of a file's head, about: the recipe's word."""
    base: Header | None = None
    """The head of the BF16 file, with which forecasts are exact."""

    def file_bytes(self, p: Plan) -> int:
        """Length of a variant's whole file."""
        return forecast_file_bytes(p, self.base) if self.base else p.bytes + self.header_bytes


def _asked(model: str, variants: Sequence[str]) -> tuple[ModelRecipe, Path, list[Variant]]:
    """The recipes that were named; raises one InputError with everything that is wrong with any of them."""
    problems: list[str] = []

    def tried(load: Callable[[str], T], name: str) -> T | None:
        try:
            return load(name)
        except InputError as e:
            problems.extend(e.problems)
            return None

    found = tried(load_model, model)
    names = variants or (found[0].variants if found else ())
    chosen = [v for name in dict.fromkeys(names) if (v := tried(load_variant, name))]
    raise_problems(problems)
    assert found is not None
    return *found, chosen


def _from_numbers(recipe: ModelRecipe, path: Path) -> _Weights:
    from quant.plan.inventory import read_architecture

    if not recipe.architecture:
        raise InputError(
            f"{path}: architecture: missing, so there is nothing to plan with; name the BF16 file with --gguf"
        )
    told = read_architecture(recipe.architecture, f"{path}: architecture")
    return _Weights(told.tensors(), told.kv_bytes_per_token(), recipe.header_bytes)


def _from_gguf(recipe: ModelRecipe, gguf: Path) -> _Weights:
    from quant.llama.gguf import read_headers
    from quant.plan.inventory import read_architecture

    headers = read_headers(gguf)
    tensors = tuple(t for h in headers for t in h.tensors)
    told = read_architecture(recipe.architecture) if recipe.architecture else None
    raise_problems(_gguf_problems(recipe, gguf, tensors, told.tensors() if told else ()))
    kv_bytes = told.kv_bytes_per_token() if told else 0
    return _Weights(
        tensors, kv_bytes, headers[0].data_start, headers[0] if len(headers) == 1 else None
    )


def _gguf_problems(
    recipe: ModelRecipe, gguf: Path, tensors: Sequence[TensorSpec], told: Sequence[TensorSpec]
) -> Iterator[str]:
    """Why this is not the model's BF16 file. MTP blocks may differ: config.json does not tell all of them."""
    if quantised := {t.type.name for t in tensors} - UNQUANTISED:
        yield f"{gguf}: expected unquantised weights (BF16), found {', '.join(sorted(quantised))}"
    found, at = {t.name: t.shape for t in tensors}, compute_depths(told)
    trunk = [t for t in told if at.get(t.name, 0) < 1]
    if wrong := [t for t in trunk if found.get(t.name) != t.shape]:
        first = wrong[0]
        yield (
            f"{gguf}: not as {recipe.title}'s recipe has it: {len(wrong):,} of {len(trunk):,} tensors, first {first.name}:"
            f" expected {first.shape}, found {found.get(first.name)}"
        )


def _document(recipe: ModelRecipe, plans: Sequence[Plan], weights: _Weights) -> dict[str, Any]:
    return {
        "model": recipe.name,
        "parameters": sum(t.tensor.elements for t in plans[0].tensors),
        "variants": [
            p.json() | {"bytes": weights.file_bytes(p), "shards": _shards(p, recipe)} for p in plans
        ],
    }


def _shards(p: Plan, recipe: ModelRecipe) -> int:
    return len(forecast_shard_bytes(p, parse_size(recipe.max_shard_size))) if p.variant.split else 1


def _show_variants(
    recipe: ModelRecipe, plans: Sequence[Plan], weights: _Weights, context: int
) -> None:
    rows = []
    for p in plans:
        needs = estimate_memory(p, weights.kv_bytes, context)
        split = (
            f"{needs.without_experts / GIB:.1f} + {needs.experts / GIB:.1f}"
            if needs.experts
            else "-"
        )
        size = weights.file_bytes(p)
        rows.append(
            (
                p.variant.name,
                f"{size:,}",
                human_bytes(size),
                f"{p.bits_per_weight:.3f}",
                str(_shards(p, recipe)),
                f"{needs.whole / GIB:.1f}",
                split,
            )
        )
    columns = (
        "variant",
        ">bytes",
        ">size",
        ">bits/weight",
        ">files",
        f">GiB at {context:,}",
        ">GiB: rest + experts",
    )
    tables.print_table(columns, rows, title=f"{recipe.title}, shards of {recipe.max_shard_size}")


def _show_classes(p: Plan) -> None:
    total = sum(t.bytes for t in p.tensors)
    rows = [
        (c.name, str(c.count), c.type, f"{c.bytes:,}", f"{100 * c.bytes / total:.1f} %")
        for c in sorted(summarize_classes(p), key=lambda c: -c.bytes)
    ]
    tables.print_table(
        ("class", ">tensors", "type", ">bytes", ">share"), rows, title=p.variant.name
    )


def _explain(
    recipe: ModelRecipe,
    variants: Sequence[Variant],
    tensors: Sequence[TensorSpec],
    name: str,
    as_json: bool,
) -> None:
    """For one tensor, the rule of each variant that decides it."""
    tensor = next((t for t in tensors if t.name == name), None)
    if tensor is None:
        raise InputError(f"tensor {name!r} is not in this model: {_nearest_tensor(name, tensors)}")
    rows = []
    for variant in variants:
        n = match_rules(variant, tensors).get(name) if variant.rules else None
        if n is None:
            rows.append((variant.name, "no rule: it keeps its type", tensor.type.name, "", ""))
        else:
            rule = variant.rules[n]
            rows.append(
                (
                    variant.name,
                    f"rules[{n}]",
                    choose_type(rule, tensor).name,
                    rule.tensors,
                    rule.why,
                )
            )
    columns = ("variant", "decided by", "type", "pattern", "why")
    if as_json:
        keys = ("variant", "rule", "type", "pattern", "why")
        told = [dict(zip(keys, row, strict=True)) for row in rows]
        click.echo(
            json.dumps({"model": recipe.name, "tensor": name, "variants": told}, ensure_ascii=False)
        )
        return
    tables.print_table(columns, rows, title=f"{name} ({tensor_class(name)})")


def _nearest_tensor(name: str, tensors: Sequence[TensorSpec]) -> str:
    """Its nearest name; for nothing alike, only the names of one block, for a model has thousands."""
    by_class = {tensor_class(t.name): t.name for t in reversed(tensors)}
    return suggest_name(
        name, [t.name for t in tensors] if tensor_class(name) in by_class else by_class.values()
    )
