"""What a card has to say of license and origin before anybody may be given the files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from quant.core.errors import InputError
from quant.hub.upload import Destination
from quant.job import BuildRequest, prepare_job
from quant.plan.load import RECIPES, load_model
from quant.plan.recipe import CardRecipe
from quant.release.card import render_card
from quant.release.license import find_license_problems
from quant.release.metadata import make_file_metadata
from tests.hub import Hub
from tests.quant.release.manifests import make_manifest
from tests.quant.release.publishing import REPO

GOOD = CardRecipe("mit", ("en",), "somebody/model")
OTHER = replace(
    GOOD, license="other", license_name="glm-4", license_link="https://somebody.example/LICENSE"
)
TINY = RECIPES / "models" / "tiny-glm.toml"


@pytest.mark.parametrize(
    "good", [GOOD, OTHER, replace(GOOD, base_model="none"), replace(GOOD, license="cc-by-nc-4.0")]
)
def test_what_allows_derivatives_and_says_its_origin_may_be_passed_on(good: CardRecipe) -> None:
    assert list(find_license_problems(good, "card")) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            replace(GOOD, license=" "),
            "card.license: expected a license, found 'none'; name it in the recipe",
        ),
        (
            replace(GOOD, license="Unknown"),
            "card.license: expected a license, found 'Unknown'; name it in the recipe",
        ),
        (
            replace(OTHER, license_name=None),
            "card.license_name: expected the license's name, because license is 'other', found none",
        ),
        (
            replace(OTHER, license_link=None),
            "card.license_link: expected the license's address, because license is 'other', found none",
        ),
        (
            replace(OTHER, license_link="LICENSE"),
            "card.license_link: expected the license's address, because license is 'other', found 'LICENSE'",
        ),
        *(
            (
                replace(GOOD, license=name),
                f"card: expected a license that allows derivatives, found '{name}'; quantized files are derivatives",
            )
            for name in ("cc-by-nd-4.0", "cc-by-nc-nd-4.0", "CC-BY-ND-4.0")
        ),
        (
            replace(OTHER, license_name="Somebody No-Derivatives 1"),
            (
                "card: expected a license that allows derivatives, found 'Somebody No-Derivatives"
                " 1'; quantized files are derivatives"
            ),
        ),
        (
            replace(GOOD, base_model=None),
            "card.base_model: expected the base model's hub repo, OWNER/NAME, or none, found nothing",
        ),
    ],
)
def test_what_forbids_to_publish_is_one_line_that_names_the_field(
    wrong: CardRecipe, message: str
) -> None:
    assert list(find_license_problems(wrong, "card")) == [message]


def test_a_license_of_another_name_stands_in_the_card_and_in_what_the_files_are_told() -> None:
    model = replace(load_model("tiny-glm")[0], card=OTHER)
    data: Any = ModelCard(render_card(model, make_manifest())).data
    expected = {
        "license": "other",
        "license_name": "glm-4",
        "license_link": "https://somebody.example/LICENSE",
    }
    assert data.to_dict().items() >= expected.items()
    for key, value in expected.items():
        assert f"{key}: {value}\n" in make_file_metadata(model).front_matter + "\n"


def test_weights_that_are_on_no_hub_are_a_quantization_of_nothing_there() -> None:
    assert "base_model" not in render_card(
        replace(load_model("tiny-glm")[0], card=replace(GOOD, base_model="none")), make_manifest()
    )


@pytest.mark.tools
@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (
            'license = "apache-2.0"',
            'license = "cc-by-nd-4.0"',
            ": card: expected a license that allows derivatives",
        ),
        ('base_model = "none"', "", ": card.base_model: expected"),
    ],
)
def test_a_build_that_may_not_be_published_is_refused_before_it_begins(
    the_hub: Hub, tmp_path: Path, line: str, instead: str, message: str
) -> None:
    recipe = tmp_path / "tiny-glm.toml"
    recipe.write_text(TINY.read_text().replace(line, instead))
    with pytest.raises(InputError) as caught:
        prepare_job(BuildRequest(str(recipe), tmp_path / "out", destination=Destination(REPO)))
    [problem] = caught.value.problems
    assert problem.startswith(f"{recipe}{message}")
    assert not the_hub.requests and not (tmp_path / "out").exists()
