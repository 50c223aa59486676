"""Keep tokens out of everything that is printed or written."""

import os
import re

TOKEN = "HF_TOKEN"


LIKE_A_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


def redact_token(text: str) -> str:
    """A text without the token, and without anything that looks like one."""
    if secret := os.environ.get(TOKEN, "").strip():
        text = text.replace(secret, "…")
    return LIKE_A_TOKEN.sub("hf_…", text)


def redact_urls(text: str) -> str:
    """A text without a token, and without what follows the ``?`` of an address: that may be a signature."""
    return redact_token(re.sub(r"(?<=\w)\?[^\s'\"]+", "", text))
