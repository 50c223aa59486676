"""Whether a release may be passed on: what it says of its licence, and of the model that it was made of. Pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

OTHER = "other"
"""The hub's word for a licence that it has no word for; the licence's own name and page have to stand beside it."""
NO_DERIVATIVES = re.compile(r"\bnd\b|no[-_ ]?deriv", re.IGNORECASE)
"""In the name of a licence: a quantised model is a derivative, and may not be passed on under it."""


def card_problems(card: Mapping[str, Any], where: str) -> Iterator[str]:
    """Everything that forbids to publish a release with this card of a recipe, each in one line."""
    licence, name, link = (
        str(card.get(key) or "").strip() for key in ("license", "license_name", "license_link")
    )
    if licence.lower() in ("", "unknown"):
        yield f"{where}.license: expected a licence, found {licence or 'none'!r}; say it in the recipe"
    if licence.lower() == OTHER and not name:
        yield f"{where}.license_name: expected the name of the licence, because license is 'other', found none"
    if licence.lower() == OTHER and not re.fullmatch(r"https?://\S+", link):
        found = repr(link) if link else "none"
        yield f"{where}.license_link: expected the address of the licence, because license is 'other', found {found}"
    if forbids := next(filter(NO_DERIVATIVES.search, (licence, name)), None):
        yield f"{where}: expected a licence that allows derivatives, found {forbids!r}; quantised files are some"
    if not card.get("base_model"):
        yield f"{where}.base_model: expected the hub's name of the model, OWNER/NAME, or none, found nothing"
