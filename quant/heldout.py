"""The texts that files are judged by, and those that sensitivities are measured on: never the same documents.

A document belongs to the held-out quarter by the digest of its name, so it stays there whatever else joins the set.
"""

import hashlib

from calibration import documents
from calibration.documents import Document
from quant.calibrate import as_read
from quant.template import ChatTemplate

HELD_OUT = 64
"""Of 256: documents whose digest begins below this are held out."""


def is_held_out(document: Document) -> bool:
    """Whether a document is for judging only."""
    return hashlib.sha256(f"held out {document.id}".encode()).digest()[0] < HELD_OUT


def texts(name: str, template: ChatTemplate | None, *, held_out: bool) -> dict[str, str]:
    """One part of a set, by domain: each file of the set is one."""
    found = {}
    for path in documents.set_files(name):
        chosen = [d for d in documents.load(str(path)) if is_held_out(d) == held_out]
        if chosen:
            found[path.stem] = "\n".join(as_read(d, template) for d in chosen) + "\n"
    return found
