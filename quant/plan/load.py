"""Load recipes from TOML files and check them; every problem of a file is reported at once."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from quant.core.data import locate_data
from quant.core.errors import InputError, raise_problems, suggest_name
from quant.core.toml import read_recipe_text, read_toml
from quant.hub.client import REPO
from quant.llama.types import FILE_TYPES, TYPES
from quant.plan.recipe import (
    FEWEST_CHUNKS,
    NAME,
    SIZE,
    EvaluationRecipe,
    ImatrixRecipe,
    ModelRecipe,
    Rule,
    TemplatePatch,
    Variant,
)

RECIPES = locate_data("recipes")
"""The folder of the recipes that this project ships."""


def load_model(name: str) -> tuple[ModelRecipe, Path]:
    """Return a model recipe and the file it was read from.

    Args:
        name: A name in recipes/models, or a path that ends in ``.toml``.

    Returns:
        The model, and the file: relative paths in the recipe start at its folder.

    Raises:
        InputError: The recipe does not exist or is wrong; every problem is listed.

    Example:
        >>> model, path = load_model("glm-4.6")
        >>> model.title, path.name
        ('GLM-4.6', 'glm-4.6.toml')
    """
    path = find_recipe_path("models", name)
    model = read_toml(path, ModelRecipe)
    raise_problems(_find_model_problems(model, path))
    return model, path


def load_variant(name: str) -> Variant:
    """Return a variant.

    Args:
        name: A name in recipes/variants, or a path that ends in ``.toml``.

    Returns:
        The variant and its rules.

    Raises:
        InputError: The recipe does not exist or is wrong; every problem is listed.

    Example:
        >>> load_variant("UD-TQ1_0").split
        False
    """
    path = find_recipe_path("variants", name)
    variant = read_toml(path, Variant)
    raise_problems(_find_variant_problems(variant, path))
    return variant


def load_template_patch(name: str) -> TemplatePatch:
    """Return a template patch.

    Args:
        name: A name in recipes/templates, or a path that ends in ``.toml``.

    Raises:
        InputError: The recipe does not exist or is wrong; every problem is listed.
    """
    path = find_recipe_path("templates", name)
    patch = read_toml(path, TemplatePatch)
    raise_problems(
        f"{path}: replacements[{n}].find: expected the text to replace, found nothing"
        for n, replacement in enumerate(patch.replacements)
        if not replacement.find.strip()
    )
    return patch


def read_type_file(path: Path) -> Variant:
    """Return a variant from a file of lines ``REGEX=type``, as llama-quantize's --tensor-type-file.

    Each expression matches whole tensor names; the first that matches decides. ``#`` begins a
    comment.

    Raises:
        InputError: The file cannot be read, or a line names no ggml type or no valid expression.
    """
    rules = []
    for number, line in enumerate(read_recipe_text(path).splitlines(), 1):
        if text := line.split("#")[0].strip():
            # The last "=": an expression may contain one, a type does not.
            pattern, _, ggml_type = text.rpartition("=")
            whole = pattern.removeprefix("^").removesuffix("$")
            # Optional, because llama-quantize accepts expressions that match no tensor.
            rules.append(Rule(whole, ggml_type.upper(), f"line {number}", optional=True))
    rules = list(_correct_case(rules))
    variant = Variant(name=path.stem, summary="", file_type="Q8_0", rules=tuple(rules))
    raise_problems(_find_variant_problems(variant, path))
    return variant


def list_recipes(kind: str) -> list[str]:
    """Return the sorted names of the shipped recipes of a kind.

    Args:
        kind: models, variants, templates or scenarios.

    Returns:
        The names, without ``.toml``.

    Example:
        >>> "glm-4.6" in list_recipes("models")
        True
    """
    return sorted(p.stem for p in (RECIPES / kind).glob("*.toml"))


def find_recipe_path(kind: str, name: str) -> Path:
    """Return the file of a recipe.

    Args:
        kind: models, variants, templates or scenarios.
        name: A shipped recipe's name, or a path that ends in ``.toml``.

    Raises:
        InputError: No shipped recipe has this name; the nearest names are suggested.
    """
    if name.endswith(".toml"):
        return Path(name)
    if name not in list_recipes(kind):
        suggestion = suggest_name(name, list_recipes(kind))
        raise InputError(f"{kind.removesuffix('s')} {name!r} is not known: {suggestion}")
    return RECIPES / kind / f"{name}.toml"


def find_model_of_file(file: str) -> str | None:
    """Return the shipped model whose title begins a file name; None if there is none.

    The longest title wins, because ``GLM-4.6`` also begins ``GLM-4.6V-Flash``.
    """
    titles = {load_model(name)[0].title.lower(): name for name in list_recipes("models")}
    matches = [title for title in titles if file.lower().startswith(f"{title}-")]
    return titles[max(matches, key=len)] if matches else None


def find_variant_of_file(file: str) -> str | None:
    """Return the shipped variant whose name ends a file name, before a shard number; else None."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.removesuffix(".gguf"))
    matches = [name for name in list_recipes("variants") if stem.endswith(f"-{name}")]
    return max(matches, key=len) if matches else None


def find_pattern_problems(pattern: str, where: str) -> Iterator[str]:
    """Yield the reason why ``pattern`` is no regular expression; ``where`` names it in the text."""
    try:
        re.compile(pattern)
    except re.error as e:
        yield f"{where}: expected a regular expression, found {pattern!r} ({e})"


def find_name_problems(name: str, where: str) -> Iterator[str]:
    """Yield the reason why ``name`` cannot be part of a file name; ``where`` names it."""
    if not NAME.fullmatch(name):
        yield f"{where}: expected letters, digits, '.', '_' and '-', found {name!r}"


def _correct_case(rules: Iterable[Rule]) -> Iterator[Rule]:
    """Spell types as ggml does: tools accept q4_k for Q4_K."""
    names = {name.upper(): name for name in TYPES}
    return (dataclasses.replace(rule, type=names.get(rule.type, rule.type)) for rule in rules)


def _find_model_problems(model: ModelRecipe, path: Path) -> Iterator[str]:
    source = model.source
    if (source.repo is None) == (source.folder is None):
        given = "both" if source.repo else "neither"
        yield f"{path}: source: expected one of repo and folder, found {given}"
    if source.repo and not REPO.fullmatch(source.repo):
        yield f"{path}: source.repo: expected OWNER/NAME, found {source.repo!r}"
    if model.publish.repo and not REPO.fullmatch(model.publish.repo):
        yield f"{path}: publish.repo: expected OWNER/NAME, found {model.publish.repo!r}"
    if model.card.base and not REPO.fullmatch(model.card.base):
        yield f"{path}: card.base_model: expected OWNER/NAME or none, found {model.card.base!r}"
    yield from find_name_problems(model.name, f"{path}: name")
    yield from find_name_problems(model.title, f"{path}: title")
    if not model.variants:
        yield f"{path}: variants: expected at least one, found none"
    if not SIZE.fullmatch(model.max_shard_size):
        size = model.max_shard_size
        yield f"{path}: max_shard_size: expected a size like 50G or 500M, found {size!r}"
    if not model.smoke:
        yield f"{path}: smoke: expected at least one turn, found none"
    yield from _find_architecture_problems(model, path)
    yield from _find_imatrix_problems(model.imatrix, f"{path}: imatrix")
    yield from _find_evaluation_problems(model.evaluation, f"{path}: evaluation")
    for n, turn in enumerate(model.smoke):
        yield from find_pattern_problems(turn.expect, f"{path}: smoke[{n}].expect")


def _find_architecture_problems(model: ModelRecipe, path: Path) -> Iterator[str]:
    from quant.plan.inventory import find_architecture_problems

    if model.architecture:
        yield from find_architecture_problems(model.architecture, f"{path}: architecture")


def _find_imatrix_problems(imatrix: ImatrixRecipe, where: str) -> Iterator[str]:
    least = {  # key: value, and the smallest that it may have
        "context": (imatrix.context, 32),
        "pass_chunks": (imatrix.pass_chunks, 1),
        "range_chunks": (imatrix.range_chunks, 1),
        "coverage.expert_tokens": (imatrix.coverage.expert_tokens, 0),
    }
    if imatrix.chunks is not None:
        least["chunks"] = (imatrix.chunks, 1)
    if imatrix.coverage.budget is not None:
        # The budget includes the first pass.
        least["coverage.budget"] = (imatrix.coverage.budget, imatrix.chunks or 1)
    yield from _find_small_values(least, where)
    floor = imatrix.coverage.floor
    if floor not in TYPES:
        suggestion = suggest_name(floor, TYPES)
        yield f"{where}.coverage.floor: {floor!r} is not one of ggml's: {suggestion}"
    elif TYPES[floor].needs_imatrix:
        yield (
            f"{where}.coverage.floor: expected a type that needs no importance matrix,"
            f" found {floor}"
        )


def _find_evaluation_problems(evaluation: EvaluationRecipe, where: str) -> Iterator[str]:
    if 0 < evaluation.chunks < FEWEST_CHUNKS or evaluation.chunks < 0:
        yield (
            f"{where}.chunks: expected 0 or at least {FEWEST_CHUNKS}, for fewer mean nothing,"
            f" found {evaluation.chunks}"
        )
    least = {"context": (evaluation.context, 32), "top": (evaluation.top, 1)}
    yield from _find_small_values(least, where)
    if not evaluation.worst > 0:
        yield f"{where}.worst: expected nats above 0, found {evaluation.worst}"


def _find_small_values(least: dict[str, tuple[int, int]], where: str) -> Iterator[str]:
    for key, (value, smallest) in least.items():
        if value < smallest:
            yield f"{where}.{key}: expected at least {smallest}, found {value}"


def _find_variant_problems(variant: Variant, path: Path) -> Iterator[str]:
    yield from find_name_problems(variant.name, f"{path}: name")
    if variant.file_type not in FILE_TYPES:
        suggestion = suggest_name(variant.file_type, FILE_TYPES)
        yield f"{path}: file_type: {variant.file_type!r} is not known: {suggestion}"
    for n, rule in enumerate(variant.rules):
        yield from _find_rule_problems(rule, f"{path}: rules[{n}]")
    if not 0 <= variant.answers <= 1:
        yield f"{path}: answers: expected a share from 0 to 1, found {variant.answers}"


def _find_rule_problems(rule: Rule, where: str) -> Iterator[str]:
    for key, name in (("type", rule.type), ("narrow", rule.narrow)):
        if name is not None and name not in TYPES:
            yield f"{where}.{key}: {name!r} is not one of ggml's: {suggest_name(name, TYPES)}"
    if rule.depth is not None and not 0 <= rule.depth[0] < rule.depth[1]:
        depth = list(rule.depth)
        yield f"{where}.depth: expected two shares, the smaller first, found {depth}"
    for key, name in (("type", rule.type), ("narrow", rule.narrow or "")):
        # TQ1_0 and TQ2_0 store -d, 0 or d: made for BitNet and TriLM, which were trained so.
        if name.startswith("TQ"):
            yield (
                f"{where}.{key}: {name} ruins weights that were not trained ternary;"
                " IQ1_S is as small"
            )
    yield from find_pattern_problems(rule.tensors, f"{where}.tensors")
