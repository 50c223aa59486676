"""What the files of a release say of their model."""

from collections.abc import Mapping

from quant.llama.convert import FileMetadata
from quant.plan.recipe import ModelRecipe


def tags(model: ModelRecipe) -> list[str]:
    """Words by which the hub finds a release."""
    return ["gguf", "imatrix", "conversational"]


def task(model: ModelRecipe) -> str:
    """The hub's name for what the model does."""
    return "image-text-to-text" if model.sees else "text-generation"


def words(model: ModelRecipe) -> FileMetadata:
    """What the files of a model's release say of it."""
    from huggingface_hub import ModelCardData

    sampling, card = model.sampling, model.card
    metadata = {
        "general.name": model.title,
        "general.basename": model.title,
        "general.sampling.temp": sampling.temperature,
        "general.sampling.top_p": sampling.top_p,
        "general.sampling.top_k": sampling.top_k,
        "general.sampling.min_p": sampling.min_p,
        "general.sampling.penalty_repeat": sampling.repeat_penalty,
    } | _told(
        {
            "general.description": card.description,
            "general.quantized_by": model.publish.by,
            "general.repo_url": f"https://huggingface.co/{model.publish.repo}"
            if model.publish.repo
            else None,
        }
    )
    data = ModelCardData(**card.front_matter, tags=tags(model), pipeline_tag=task(model))
    return FileMetadata(model.title, metadata, data.to_yaml(), model.pre_tokenizer)


def _told(metadata: Mapping[str, str | None]) -> dict[str, str]:
    """Only what there is something to say about."""
    return {key: value for key, value in metadata.items() if value}
