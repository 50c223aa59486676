"""Load recipes from TOML files and check them."""

import dataclasses
import re
import typing
from pathlib import Path

from quant.core.data import data_folder
from quant.core.toml import read_recipe_text, read_toml
from quant.errors import InputError, raise_problems, suggest_name
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

RECIPES = data_folder("recipes")


def load_model(name: str) -> tuple[ModelRecipe, Path]:
    """A model by its name in recipes/models or by a path, and the file it came from. Raises InputError."""
    path = find_recipe_path("models", name)
    model = read_toml(path, ModelRecipe)
    raise_problems(_model_problems(model, path))
    return model, path


def _architecture_problems(model: ModelRecipe, path: Path) -> typing.Iterator[str]:
    from quant.plan.inventory import find_architecture_problems

    if model.architecture:
        yield from find_architecture_problems(model.architecture, f"{path}: architecture")


def find_model_of_file(file: str) -> str | None:
    """The project's model whose title begins a file's name; the longest, because GLM-4.6 begins GLM-4.6V-Flash too."""
    titles = {load_model(name)[0].title.lower(): name for name in list_recipes("models")}
    fitting = [title for title in titles if file.lower().startswith(f"{title}-")]
    return titles[max(fitting, key=len)] if fitting else None


def find_variant_of_file(file: str) -> str | None:
    """The project's variant with whose name a file's name ends, before the number of a shard."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.removesuffix(".gguf"))
    fitting = [name for name in list_recipes("variants") if stem.endswith(f"-{name}")]
    return max(fitting, key=len) if fitting else None


def load_variant(name: str) -> Variant:
    """A variant by its name in recipes/variants or by a path. Raises InputError."""
    path = find_recipe_path("variants", name)
    variant = read_toml(path, Variant)
    raise_problems(_variant_problems(variant, path))
    return variant


def load_template_patch(name: str) -> TemplatePatch:
    """A template patch by its name in recipes/templates or by a path. Raises InputError."""
    path = find_recipe_path("templates", name)
    by = read_toml(path, TemplatePatch)
    raise_problems(
        f"{path}: replacements[{n}].find: expected the text to replace, found nothing"
        for n, change in enumerate(by.replacements)
        if not change.find.strip()
    )
    return by


def read_type_file(path: Path) -> Variant:
    """A variant from lines ``REGEX=type``, each for whole names, the first that matches deciding. Raises InputError."""
    rules = []
    for number, line in enumerate(read_recipe_text(path).splitlines(), 1):
        if text := line.split("#")[0].strip():
            pattern, _, ggml_type = text.rpartition("=")
            rules.append(
                Rule(
                    pattern.removeprefix("^").removesuffix("$"),
                    ggml_type.upper(),
                    f"line {number}",
                    optional=True,
                )
            )
    variant = Variant(name=path.stem, summary="", file_type="Q8_0", rules=tuple(_spelt(rules)))
    raise_problems(_variant_problems(variant, path))
    return variant


def list_recipes(kind: str) -> list[str]:
    """The names of the project's own recipes of a kind: models, variants or templates."""
    return sorted(p.stem for p in (RECIPES / kind).glob("*.toml"))


def _spelt(rules: typing.Iterable[Rule]) -> typing.Iterator[Rule]:
    """Types as ggml spells them: tools take q4_k for Q4_K."""
    names = {name.upper(): name for name in TYPES}
    return (dataclasses.replace(rule, type=names.get(rule.type, rule.type)) for rule in rules)


def find_recipe_path(kind: str, name: str) -> Path:
    """The file of a recipe, by its name among the project's own or by a path. Raises InputError."""
    if name.endswith(".toml"):
        return Path(name)
    if name not in list_recipes(kind):
        raise InputError(
            f"{kind.removesuffix('s')} {name!r} is not known: {suggest_name(name, list_recipes(kind))}"
        )
    return RECIPES / kind / f"{name}.toml"


def _model_problems(model: ModelRecipe, path: Path) -> typing.Iterator[str]:
    source = model.source
    if (source.repo is None) == (source.folder is None):
        yield f"{path}: source: expected one of repo and folder, found {'both' if source.repo else 'neither'}"
    if source.repo and not REPO.fullmatch(source.repo):
        yield f"{path}: source.repo: expected OWNER/NAME, found {source.repo!r}"
    if model.publish.repo and not REPO.fullmatch(model.publish.repo):
        yield f"{path}: publish.repo: expected OWNER/NAME, found {model.publish.repo!r}"
    if model.card.base and not REPO.fullmatch(model.card.base):
        yield f"{path}: card.base_model: expected OWNER/NAME or none, found {model.card.base!r}"
    yield from _name_problems(model.name, f"{path}: name")
    yield from _name_problems(model.title, f"{path}: title")
    if not model.variants:
        yield f"{path}: variants: expected at least one, found none"
    if not SIZE.fullmatch(model.max_shard_size):
        yield f"{path}: max_shard_size: expected a size like 50G or 500M, found {model.max_shard_size!r}"
    if not model.smoke:
        yield f"{path}: smoke: expected at least one turn, found none"
    yield from _architecture_problems(model, path)
    yield from _imatrix_problems(model.imatrix, f"{path}: imatrix")
    yield from _evaluation_problems(model.evaluation, f"{path}: evaluation")
    for n, turn in enumerate(model.smoke):
        yield from find_pattern_problems(turn.expect, f"{path}: smoke[{n}].expect")


def _imatrix_problems(told: ImatrixRecipe, where: str) -> typing.Iterator[str]:
    least = {
        "context": (told.context, 32),
        "pass_chunks": (told.pass_chunks, 1),
        "range_chunks": (told.range_chunks, 1),
    }
    least["coverage.expert_tokens"] = (told.coverage.expert_tokens, 0)
    if told.chunks is not None:
        least["chunks"] = (told.chunks, 1)
    if told.coverage.budget is not None:
        least["coverage.budget"] = (told.coverage.budget, told.chunks or 1)
    yield from (
        f"{where}.{key}: expected at least {n}, found {found}"
        for key, (found, n) in least.items()
        if found < n
    )
    floor = told.coverage.floor
    if floor not in TYPES:
        yield f"{where}.coverage.floor: {floor!r} is not one of ggml's: {suggest_name(floor, TYPES)}"
    elif TYPES[floor].needs_imatrix:
        yield f"{where}.coverage.floor: expected a type that needs no importance matrix, found {floor}"


def _evaluation_problems(told: EvaluationRecipe, where: str) -> typing.Iterator[str]:
    if 0 < told.chunks < FEWEST_CHUNKS or told.chunks < 0:
        yield f"{where}.chunks: expected 0 or at least {FEWEST_CHUNKS}, for fewer mean nothing, found {told.chunks}"
    least = {"context": (told.context, 32), "top": (told.top, 1)}
    yield from (
        f"{where}.{key}: expected at least {n}, found {found}"
        for key, (found, n) in least.items()
        if found < n
    )
    if not told.worst > 0:
        yield f"{where}.worst: expected nats above 0, found {told.worst}"


def _variant_problems(variant: Variant, path: Path) -> typing.Iterator[str]:
    yield from _name_problems(variant.name, f"{path}: name")
    if variant.file_type not in FILE_TYPES:
        yield f"{path}: file_type: {variant.file_type!r} is not known: {suggest_name(variant.file_type, FILE_TYPES)}"
    for n, rule in enumerate(variant.rules):
        if rule.type not in TYPES:
            yield f"{path}: rules[{n}].type: {rule.type!r} is not one of ggml's: {suggest_name(rule.type, TYPES)}"
        if rule.narrow is not None and rule.narrow not in TYPES:
            yield f"{path}: rules[{n}].narrow: {rule.narrow!r} is not one of ggml's: {suggest_name(rule.narrow, TYPES)}"
        if rule.depth is not None and not 0 <= rule.depth[0] < rule.depth[1]:
            yield f"{path}: rules[{n}].depth: expected two shares, the smaller first, found {list(rule.depth)}"
        for key, name in (("type", rule.type), ("narrow", rule.narrow or "")):
            if name.startswith("TQ"):
                yield f"{path}: rules[{n}].{key}: {name} ruins weights that were not trained ternary; IQ1_S is as small"
        yield from find_pattern_problems(rule.tensors, f"{path}: rules[{n}].tensors")
    if not 0 <= variant.answers <= 1:
        yield f"{path}: answers: expected a share from 0 to 1, found {variant.answers}"


def _name_problems(name: str, where: str) -> typing.Iterator[str]:
    if not NAME.fullmatch(name):
        yield f"{where}: expected letters, digits, '.', '_' and '-', found {name!r}"


def find_pattern_problems(pattern: str, where: str) -> typing.Iterator[str]:
    """What is wrong with a regular expression."""
    try:
        re.compile(pattern)
    except re.error as e:
        yield f"{where}: expected a regular expression, found {pattern!r} ({e})"
