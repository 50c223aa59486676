"""The metadata that the files and the card of a release have in common."""

from quant.llama.convert import FileMetadata
from quant.plan.recipe import ModelRecipe

TAGS = ("gguf", "imatrix", "conversational")
"""Tags by which the hub finds a release."""


def find_pipeline_tag(model: ModelRecipe) -> str:
    """Return the hub's name for the model's task."""
    return "image-text-to-text" if model.has_vision else "text-generation"


def make_file_metadata(model: ModelRecipe) -> FileMetadata:
    """Return the metadata that goes into every GGUF of a model's release.

    Sampling goes into ``general.sampling.*``, which llama.cpp reads as its defaults
    (common/arg.cpp); license, languages, base model and tags go through the front matter that the
    converter reads from a model card.
    """
    from huggingface_hub import ModelCardData  # takes half a second

    sampling, card = model.sampling, model.card
    repo = model.publish.repo
    optional = {
        "general.description": card.description,
        "general.quantized_by": model.publish.quantizer,
        "general.repo_url": f"https://huggingface.co/{repo}" if repo else None,
    }
    metadata = {
        # Without these, gguf-py derives both from the folder's name (metadata.py,
        # apply_metadata_heuristic).
        "general.name": model.title,
        "general.basename": model.title,
        "general.sampling.temp": sampling.temperature,
        "general.sampling.top_p": sampling.top_p,
        "general.sampling.top_k": sampling.top_k,
        "general.sampling.min_p": sampling.min_p,
        "general.sampling.penalty_repeat": sampling.repeat_penalty,
    } | {key: value for key, value in optional.items() if value}
    front_matter = ModelCardData(
        **card.front_matter, tags=list(TAGS), pipeline_tag=find_pipeline_tag(model)
    )
    return FileMetadata(model.title, metadata, front_matter.to_yaml(), model.pre_tokenizer)
