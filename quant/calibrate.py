"""Render the calibration set with the model's own, patched chat template: the text that the imatrix is computed on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from calibration import documents
from calibration.documents import Document
from quant import files
from quant.convert import Base
from quant.errors import InputError
from quant.files import Receipt
from quant.recipe import Imatrix, Model
from quant.store import Store
from quant.template import ChatTemplate, render
from quant.tokens import Tokenizer
from quant.toolchain import Toolchain


@dataclass(frozen=True)
class CalibrationText:
    """What the model reads while its activations are measured."""

    path: Path
    receipt: Receipt
    name: str
    """Of the set."""
    documents: int
    tokens: int
    """As the model counts them."""


def calibrate(
    model: Model, template: ChatTemplate | None, base: Base, tools: Toolchain, store: Store
) -> CalibrationText:
    """The model's calibration set as one text, special tokens written out."""
    return of_set(model.imatrix, template, base, tools, store)


def of_set(
    settings: Imatrix, template: ChatTemplate | None, base: Base, tools: Toolchain, store: Store
) -> CalibrationText:
    """The same without a recipe of a model."""
    name = settings.calibration
    sources = documents.set_files(name)
    inputs = {
        "set": {p.name: files.digest(p) for p in sources},
        "template": template.sha256 if template else None,
        "order": "by the digest of the documents' names",
    }
    tokenizer = Tokenizer(base.path, tools)
    inputs["tokenizer"] = tokenizer.digest
    count = len(documents.load(name))

    def make(partial: Path) -> dict[str, int]:
        facts = write(name, template, partial / "calibration.txt")
        return facts | {"tokens": tokenizer.count((partial / "calibration.txt").read_text())}

    done = store.once("calibrate", inputs, make)
    text = done.receipt("calibration.txt")
    return CalibrationText(done.path("calibration.txt"), text, Path(name).stem, count, done.facts["tokens"])


def as_read(document: Document, template: ChatTemplate | None) -> str:
    """One document as the model reads it; without a template, its messages as plain paragraphs."""
    if template is None:
        return "\n\n".join(str(m.get("content") or "") for m in document.messages)
    messages, tools = list(document.messages), list(document.tools) or None
    try:
        return render(template.text, messages, tools=tools, enable_thinking=document.thinking)
    except InputError as e:
        raise InputError(f"calibration document {document.id}: {e}") from e


def write(name: str, template: ChatTemplate | None, out: Path) -> dict[str, int]:
    """Write a set, rendered, as one text."""
    # By the digest of its name: themes are mixed, always in the same way, so the first chunks are a fair sample of all.
    mixed = sorted(documents.load(name), key=lambda document: hashlib.sha256(document.id.encode()).digest())
    texts = [as_read(document, template) for document in mixed]
    files.write_text(out, "\n".join(texts) + "\n")
    return {"documents": len(texts), "characters": sum(map(len, texts))}
