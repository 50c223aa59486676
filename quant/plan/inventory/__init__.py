"""A model's tensors from its configuration alone: names, shapes and storage types of the BF16 file, without one weight.

What the converter writes is the truth; tests convert random models with shrunken numbers and compare every entry. The
numbers are those of config.json; the little that it cannot tell (whether an MTP block has an embedding of its own) is
asked for by name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from quant.errors import InputError, raise_problems, suggest_name
from quant.llama.gguf import TensorSpec
from quant.plan.inventory import glm4, glm4_moe, mla, vision
from quant.plan.inventory.config import ArchitectureConfig, read_numbers

ARCHITECTURES: dict[str, type[ArchitectureConfig]] = {
    "Glm4MoeForCausalLM": glm4_moe.Glm4Moe,
    "Glm4MoeLiteForCausalLM": mla.Glm4MoeLite,
    "GlmMoeDsaForCausalLM": mla.GlmMoeDsa,
    "Glm4ForCausalLM": glm4.Glm4,
    "Glm4vForConditionalGeneration": glm4.Glm4,
}
"""Classes of config.json whose text file is known."""
VISION: dict[str, type[ArchitectureConfig]] = {"Glm4vForConditionalGeneration": vision.Glm4v}
"""Classes that also have a vision file."""


def list_tensors(config: Mapping[str, Any], where: str = "config.json") -> tuple[TensorSpec, ...]:
    """The tensors of the BF16 file of a model's text part.

    Raises InputError for a class that is not known, or numbers that are missing, of the wrong kind, or impossible.
    """
    return read_architecture(config, where).tensors()


def list_vision_tensors(
    config: Mapping[str, Any], where: str = "config.json"
) -> tuple[TensorSpec, ...]:
    """The tensors of the F16 file of a model's vision part (mmproj); none for a model that only reads."""
    name = read_class_name(config, where)
    if name not in VISION:
        return ()
    vision_config = config.get("vision_config")
    if not isinstance(vision_config, Mapping):
        raise InputError(
            f"{where}: vision_config: expected the numbers of the vision part, found {vision_config!r}"
        )
    return read_numbers(VISION[name], vision_config, f"{where}: vision_config").tensors()


def read_architecture(config: Mapping[str, Any], where: str = "config.json") -> ArchitectureConfig:
    """The numbers of a model's text part, checked."""
    name = read_class_name(config, where)
    text = config.get("text_config")
    return read_numbers(
        ARCHITECTURES[name], {**config, **text} if isinstance(text, Mapping) else config, where
    )


def read_class_name(config: Mapping[str, Any], where: str) -> str:
    """The model's class; raises InputError with the nearest known one."""
    listed = config.get("architectures")
    found = listed[0] if isinstance(listed, list) and listed else listed
    if found not in list(ARCHITECTURES):
        raise InputError(
            f"{where}: architectures: {found!r} is not known: {suggest_name(str(found), ARCHITECTURES)}"
        )
    return str(found)


def count_parameters(tensors: tuple[TensorSpec, ...]) -> int:
    """Weights in all tensors."""
    return sum(t.elements for t in tensors)


def find_architecture_problems(config: Mapping[str, Any], where: str) -> Iterator[str]:
    """What is wrong with the numbers that a recipe states; unlike config.json's, every key must be one that counts."""
    try:
        name = read_class_name(config, where)
        known = {
            f for kind in (ARCHITECTURES[name], VISION.get(name)) if kind for f in kind.names()
        } | COMMON
        parts = [
            config,
            *(config[key] for key in ("text_config", "vision_config") if key in config),
        ]
        raise_problems(
            f"{where}: expected tables of numbers, found {p!r}"
            for p in parts
            if not isinstance(p, Mapping)
        )
        flat = [key for part in parts for key in part]
        raise_problems(
            f"{where}: {key}: unknown key; {suggest_name(key, known)}"
            for key in flat
            if key not in known
        )
        list_tensors(config, where)
        list_vision_tensors(config, where)
    except InputError as e:
        yield from e.problems


COMMON = {"architectures", "text_config", "vision_config", "max_position_embeddings"}
"""Keys of a recipe's numbers beside those that an architecture asks for."""
