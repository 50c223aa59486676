"""List a model's tensors from config.json alone: names, shapes and types of the BF16 file.

llama.cpp's converter is the reference: tests convert random models with small dimensions and
compare every entry. Keys have config.json's names. The one fact that config.json lacks, whether an
MTP block has an embedding of its own, is the key ``mtp_own_embedding`` of a recipe.

```
config      read and check keys; helpers for single tensors
moe, mla    what mixtures of experts, and latent attention, have in common
glm4, glm4_moe, vision    one architecture each; mla has GLM-4.7-Flash and GLM-5 too
```

A new architecture is one class, entered in ``ARCHITECTURES`` and in the tests' conversion cases.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from quant.core.errors import InputError, raise_problems, suggest_name
from quant.llama.gguf import TensorSpec
from quant.plan.inventory import glm4, glm4_moe, mla, vision
from quant.plan.inventory.config import ArchitectureConfig, parse_config

ARCHITECTURES: dict[str, type[ArchitectureConfig]] = {
    "Glm4MoeForCausalLM": glm4_moe.Glm4Moe,
    "Glm4MoeLiteForCausalLM": mla.Glm4MoeLite,
    "GlmMoeDsaForCausalLM": mla.GlmMoeDsa,
    "Glm4ForCausalLM": glm4.Glm4,
    "Glm4vForConditionalGeneration": glm4.Glm4,
}
"""Supported classes of config.json, and the architecture of their text part."""
VISION: dict[str, type[ArchitectureConfig]] = {"Glm4vForConditionalGeneration": vision.Glm4v}
"""Classes that also have a vision part."""
COMMON_KEYS = {"architectures", "text_config", "vision_config", "max_position_embeddings"}
"""Keys of a recipe's ``[architecture]`` beside those of the architecture."""


def list_tensors(config: Mapping[str, Any], where: str = "config.json") -> tuple[TensorSpec, ...]:
    """Return the tensors of the BF16 file of a model's text part.

    Args:
        config: config.json, or ``[architecture]`` of a recipe.
        where: The name of the configuration in errors.

    Raises:
        InputError: The class is not supported, or keys are missing or wrong.

    Example:
        >>> from quant.plan.load import load_model
        >>> tensors = list_tensors(load_model("glm-4.6")[0].architecture)
        >>> f"{len(tensors):,} tensors, {count_parameters(tensors):,} weights"
        '1,759 tensors, 356,785,898,816 weights'
    """
    return read_architecture(config, where).tensors()


def list_vision_tensors(
    config: Mapping[str, Any], where: str = "config.json"
) -> tuple[TensorSpec, ...]:
    """Return the tensors of a model's F16 vision file (mmproj); none for a text-only model.

    Raises:
        InputError: As ``list_tensors``.
    """
    name = read_class_name(config, where)
    if name not in VISION:
        return ()
    vision_config = config.get("vision_config")
    if not isinstance(vision_config, Mapping):
        raise InputError(
            f"{where}: vision_config: expected the numbers of the vision part,"
            f" found {vision_config!r}"
        )
    return parse_config(VISION[name], vision_config, f"{where}: vision_config").tensors()


def read_architecture(config: Mapping[str, Any], where: str = "config.json") -> ArchitectureConfig:
    """Return the checked keys of a model's text part; arguments and errors as ``list_tensors``."""
    name = read_class_name(config, where)
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, Mapping) else config
    return parse_config(ARCHITECTURES[name], merged, where)


def read_class_name(config: Mapping[str, Any], where: str) -> str:
    """Return the model's class name.

    Raises:
        InputError: The class is not supported; the nearest name is suggested.
    """
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else listed
    if name not in list(ARCHITECTURES):  # a list, because the value may not be hashable
        suggestion = suggest_name(str(name), ARCHITECTURES)
        raise InputError(f"{where}: architectures: {name!r} is not known: {suggestion}")
    return str(name)


def count_parameters(tensors: tuple[TensorSpec, ...]) -> int:
    """Return the number of weights in all tensors."""
    return sum(t.elements for t in tensors)


def find_architecture_problems(config: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what is wrong with ``[architecture]`` of a recipe.

    Unlike in config.json, a key that decides nothing is an error: it is a misspelling.
    """
    try:
        name = read_class_name(config, where)
        known = {*COMMON_KEYS, *ARCHITECTURES[name].keys()}
        known |= {*VISION[name].keys()} if name in VISION else set()
        nested = (config[key] for key in ("text_config", "vision_config") if key in config)
        parts = [config, *nested]
        raise_problems(
            f"{where}: expected tables of numbers, found {part!r}"
            for part in parts
            if not isinstance(part, Mapping)
        )
        raise_problems(
            f"{where}: {key}: unknown key; {suggest_name(key, known)}"
            for part in parts
            for key in part
            if key not in known
        )
        list_tensors(config, where)
        list_vision_tensors(config, where)
    except InputError as e:
        yield from e.problems
