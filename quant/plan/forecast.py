"""Plan a whole release without weights: what every file will contain and weigh."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from quant.core.errors import InputError, raise_problems
from quant.llama.gguf import Header, TensorSpec, read_headers
from quant.plan.inventory import read_architecture
from quant.plan.load import load_model, load_variant
from quant.plan.plan import Plan, compute_depths, find_plan_problems, make_plan
from quant.plan.recipe import ModelRecipe, Variant, parse_size
from quant.plan.sizes import (
    Memory,
    estimate_build_bytes,
    estimate_memory,
    find_oversized,
    forecast_file_bytes,
    forecast_shard_bytes,
    read_kv_cache,
)

T = TypeVar("T")
UNQUANTIZED = {"BF16", "F16", "F32"}


@dataclass(frozen=True)
class ReleasePlan:
    """The plans of a model's variants, and what their files will weigh."""

    model: ModelRecipe
    variants: tuple[Variant, ...]
    tensors: tuple[TensorSpec, ...]
    """The tensors of the BF16 file."""
    kv_bytes: int
    """Bytes of KV cache for one token of context."""
    header_bytes: int
    """Bytes of a file's head, about: as the recipe states it."""
    base: Header | None = None
    """Head of the BF16 file, with which forecasts are exact to the byte."""

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each variant.

        Raises:
            InputError: With every rule that fits no tensor, and every tensor that fits no shard.
        """
        # Of all variants at once: make_plan would stop at the first one with a problem.
        raise_problems(p for v in self.variants for p in find_plan_problems(v, self.tensors, None))
        plans = tuple(make_plan(variant, self.tensors) for variant in self.variants)
        raise_problems(p for m in plans for p in find_oversized(m, self.model.max_shard_size))
        return plans

    def forecast_bytes(self, plan: Plan) -> int:
        """Return the length of a variant in bytes, as one file."""
        if self.base:
            return forecast_file_bytes(plan, self.base)
        return plan.bytes + self.header_bytes

    def count_shards(self, plan: Plan) -> int:
        """Return how many files a variant is."""
        if not plan.variant.split:
            return 1
        return len(forecast_shard_bytes(plan, parse_size(self.model.max_shard_size)))

    def estimate_memory(self, plan: Plan, context: int) -> Memory:
        """Return the memory to run a variant with that many tokens of context."""
        return estimate_memory(plan, self.kv_bytes, context)

    @property
    def disk_bytes(self) -> int:
        """Disk that a build of these variants takes: download, BF16 file, every variant."""
        return estimate_build_bytes(self.tensors, self.plans, self.model)

    def json(self) -> dict[str, Any]:
        """Return the document that ``quant plan --json`` prints."""
        return {
            "model": self.model.name,
            "parameters": sum(t.elements for t in self.tensors),
            "variants": [
                p.json() | {"bytes": self.forecast_bytes(p), "shards": self.count_shards(p)}
                for p in self.plans
            ],
        }


def plan_model(
    model: str, variants: Sequence[str] = (), gguf: str | Path | None = None
) -> ReleasePlan:
    """Plan the release of a model: a type for every tensor of every variant. Needs no weights.

    Args:
        model: The name of a model recipe, or a path to one.
        variants: Names of variants or paths to them; the recipe's when empty.
        gguf: The model's BF16 file, instead of the recipe's ``[architecture]``.

    Returns:
        The plans, with forecasts of size, shards, memory and disk.

    Raises:
        InputError: With everything that is wrong with the recipes, or if the GGUF is another model.

    Example:
        >>> release = plan_model("glm-4.6", ["UD-Q2_K_XL"])
        >>> [plan] = release.plans
        >>> round(plan.bits_per_weight, 2), release.count_shards(plan)
        (3.03, 3)
    """
    recipe, path, chosen = _load_recipes(model, variants)
    if gguf:
        return _plan_gguf(recipe, chosen, Path(gguf))
    if not recipe.architecture:
        raise InputError(
            f"{path}: architecture: missing, so there is nothing to plan with;"
            " name the BF16 file with --gguf"
        )
    architecture = read_architecture(recipe.architecture, f"{path}: architecture")
    return ReleasePlan(
        model=recipe,
        variants=chosen,
        tensors=architecture.tensors(),
        kv_bytes=architecture.kv_bytes_per_token(),
        header_bytes=recipe.header_bytes,
    )


def _plan_gguf(recipe: ModelRecipe, variants: tuple[Variant, ...], gguf: Path) -> ReleasePlan:
    headers = read_headers(gguf)
    tensors = tuple(t for h in headers for t in h.tensors)
    architecture = read_architecture(recipe.architecture) if recipe.architecture else None
    expected = architecture.tensors() if architecture else ()
    raise_problems(_find_gguf_problems(recipe, gguf, tensors, expected))
    kv_cache = architecture.kv_cache() if architecture else read_kv_cache(headers[0].metadata)
    return ReleasePlan(
        model=recipe,
        variants=variants,
        tensors=tensors,
        kv_bytes=kv_cache.bytes_per_token,
        header_bytes=headers[0].data_start,
        # A shard's head has the keys split.* too, so no length follows from it to the byte.
        base=headers[0] if len(headers) == 1 else None,
    )


def _load_recipes(
    model: str, variants: Sequence[str]
) -> tuple[ModelRecipe, Path, tuple[Variant, ...]]:
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
    chosen = tuple(v for name in dict.fromkeys(names) if (v := collect(load_variant, name)))
    raise_problems(problems)
    assert loaded is not None
    return *loaded, chosen


def _find_gguf_problems(
    recipe: ModelRecipe,
    gguf: Path,
    tensors: Sequence[TensorSpec],
    expected: Sequence[TensorSpec],
) -> Iterator[str]:
    """Yield why this is not the model's BF16 file."""
    if quantized := {t.type.name for t in tensors} - UNQUANTIZED:
        names = ", ".join(sorted(quantized))
        yield f"{gguf}: expected unquantized weights (BF16), found {names}"
    shapes, depths = {t.name: t.shape for t in tensors}, compute_depths(expected)
    # MTP blocks may differ: config.json does not state all of their tensors, and the converter's
    # --no-mtp omits them.
    trunk = [t for t in expected if depths.get(t.name, 0) < 1]
    if wrong := [t for t in trunk if shapes.get(t.name) != t.shape]:
        first = wrong[0]
        yield (
            f"{gguf}: differs from {recipe.title}'s recipe: {len(wrong):,} of {len(trunk):,}"
            f" tensors, first {first.name}: expected {first.shape},"
            f" found {shapes.get(first.name)}"
        )
