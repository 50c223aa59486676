"""Whether a release may be passed on, by its card's license and base model. Pure."""

import re
from collections.abc import Iterator

from quant.plan.recipe import CardRecipe

OTHER = "other"
"""The hub's value for a license that it has no name for. It needs a name and a link."""
# The hub's names are like cc-by-nc-nd-4.0. The name of another license is free text.
NO_DERIVATIVES = re.compile(r"\bnd\b|no[-_ ]?deriv", re.IGNORECASE)
"""In the name of a license. A quantized model is a derivative and may not be passed on under it."""


def find_license_problems(card: CardRecipe, where: str) -> Iterator[str]:
    """Yield everything in a recipe's card that forbids to publish the release, a line each.

    Args:
        card: The card of a model recipe.
        where: Names the card in errors.
    """
    name = (card.license or "").strip()
    own_name, link = (card.license_name or "").strip(), (card.license_link or "").strip()
    # "unknown" is one of the hub's license names.
    if name.lower() in ("", "unknown"):
        yield (
            f"{where}.license: expected a license, found {name or 'none'!r}; name it in the recipe"
        )
    if name.lower() == OTHER and not own_name:
        yield (
            f"{where}.license_name: expected the license's name, because license is 'other',"
            " found none"
        )
    if name.lower() == OTHER and not re.fullmatch(r"https?://\S+", link):
        yield (
            f"{where}.license_link: expected the license's address, because license is 'other',"
            f" found {repr(link) if link else 'none'}"
        )
    if forbidding := next(filter(NO_DERIVATIVES.search, (name, own_name)), None):
        yield (
            f"{where}: expected a license that allows derivatives, found {forbidding!r};"
            " quantized files are derivatives"
        )
    if not card.base_model:
        yield (
            f"{where}.base_model: expected the base model's hub repo, OWNER/NAME, or none, found"
            " nothing"
        )
