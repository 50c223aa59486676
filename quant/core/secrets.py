"""Keep tokens and signed URLs out of everything that is printed or written."""

import os
import re

TOKEN = "HF_TOKEN"
"""The environment variable that holds the hub's token."""
# Sixteen letters: more than words that begin with hf_, such as hf_transfer, and less than a token,
# so that one that was cut is hidden too.
LIKE_A_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


def redact_token(text: str) -> str:
    """Return a text without the token of the environment or anything that looks like a token."""
    # The environment's own first: a token of another hub need not have the form.
    if secret := os.environ.get(TOKEN, "").strip():
        text = text.replace(secret, "…")
    return LIKE_A_TOKEN.sub("hf_…", text)


def redact_urls(text: str) -> str:
    """Return a text without tokens and without the queries of URLs.

    The hub redirects to storage URLs whose query is a signature; whoever has it can read the file.
    """
    return redact_token(re.sub(r"(?<=\w)\?[^\s'\"]+", "", text))
