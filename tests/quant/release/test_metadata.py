"""What the files of a release say of it in their metadata."""

from dataclasses import replace

from quant.plan.load import load_model
from quant.plan.recipe import CardRecipe, PublishRecipe
from quant.release.metadata import make_file_metadata

TINY, _ = load_model("tiny-glm")


def test_files_that_are_published_say_who_made_them_and_where_they_are() -> None:
    metadata = make_file_metadata(
        replace(TINY, publish=PublishRecipe("somebody/tiny-GGUF"))
    ).metadata
    assert metadata["general.quantized_by"] == "somebody"
    assert metadata["general.repo_url"] == "https://huggingface.co/somebody/tiny-GGUF"
    named = make_file_metadata(
        replace(TINY, publish=PublishRecipe("somebody/tiny-GGUF", quantized_by="Some Body"))
    ).metadata
    assert named["general.quantized_by"] == "Some Body"


def test_files_of_a_model_with_no_repo_claim_none() -> None:
    assert (
        not {"general.quantized_by", "general.repo_url"} & make_file_metadata(TINY).metadata.keys()
    )


def test_the_converter_is_told_licence_languages_base_model_and_tags() -> None:
    metadata = make_file_metadata(
        replace(TINY, card=CardRecipe("mit", ("en", "zh"), "zai-org/GLM-4.6"))
    ).front_matter
    for line in (
        "license: mit",
        "- zh",
        "base_model: zai-org/GLM-4.6",
        "- imatrix",
        "pipeline_tag: text-generation",
    ):
        assert line in metadata
