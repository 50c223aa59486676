"""Render the calibration set with the model's own, patched chat template: the text that the imatrix is computed on.

What is made: the text, packed into chunks of the context's length; the documents that are held out, rendered as well, which
no importance matrix ever sees; and what is in them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.calibration import datasets, dedupe, packing, sets
from quant.calibration.documents import Document
from quant.calibration.sets import CalibrationSet
from quant.chat.template import ChatTemplate, render_template
from quant.core import files
from quant.core.files import Receipt
from quant.core.format import hash_texts, to_canonical_json
from quant.core.store import Store
from quant.errors import InputError, raise_problems
from quant.llama.model_file import ModelFile
from quant.llama.tokenizer import TextCounter, Tokenizer
from quant.llama.toolchain import Toolchain
from quant.plan.recipe import ImatrixRecipe, ModelRecipe

TEXT, HELD_OUT = "calibration.txt", "held-out.jsonl"
HOW = "packed 1"
"""Names the way in which a text is put together; another way is another text."""


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
    facts: Mapping[str, Any]
    """What is in it, source by source, as plain JSON."""
    held_out: Path | None = None
    """Lines of JSON: see :func:`held_out_texts`."""

    def json(self) -> dict[str, Any]:
        """As a manifest tells it."""
        about = {
            "set": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "sha256": self.receipt.sha256,
        }
        return about | {k: v for k, v in self.facts.items() if k not in about}


@dataclass(frozen=True)
class HeldOutText:
    """A document that the importance matrix never saw, as the model reads it."""

    id: str
    source: str
    kind: str
    language: str
    text: str


@dataclass(frozen=True)
class RenderedDocument:
    """A set, chosen and rendered: what is read, and what is held out."""

    told: CalibrationSet
    read: tuple[Document, ...]
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    held_out: tuple[HeldOutText, ...]
    dropped: int
    """Documents that were too much like others."""

    def json(self) -> dict[str, Any]:
        """What is in it, source by source."""
        found, whole = packing.count_tokens(self.read, self.tokens), max(sum(self.tokens), 1)
        sources = []
        for s in self.told.source:
            documents, tokens = found.get(s.name, (0, 0))
            about: dict[str, Any] = {
                "name": s.name,
                "kind": s.kind,
                "licence": s.licence,
                "attribution": s.attribution,
                "repo": s.repo,
            }
            about |= {
                "documents": documents,
                "tokens": tokens,
                "share": round(tokens / whole, 4),
                "share_wanted": s.share,
            }
            sources.append({k: v for k, v in about.items() if v not in (None, "")})
        return {"near_duplicates": self.dropped, "held_out": len(self.held_out), "sources": sources}


def build_calibration_text(
    model: ModelRecipe,
    template: ChatTemplate | None,
    base: ModelFile,
    tools: Toolchain,
    store: Store,
) -> CalibrationText:
    """The model's calibration set as one text, special tokens written out."""
    return build_set_text(model.imatrix, template, base, tools, store)


def build_set_text(
    settings: ImatrixRecipe,
    template: ChatTemplate | None,
    base: ModelFile,
    tools: Toolchain,
    store: Store,
) -> CalibrationText:
    """The same without a recipe of a model."""
    told, folder = sets.find_set(settings.calibration)
    locked = datasets.read_dataset_lock(told, folder)
    tokenizer = Tokenizer(base.path, tools)
    inputs = {
        "set": hash_texts([to_canonical_json(datasets.source_identity(told, folder, locked))]),
        "template": template.sha256 if template else None,
        "tokenizer": tokenizer.digest,
        "context": settings.context,
        "how": HOW,
    }

    def make(partial: Path) -> dict[str, Any]:
        rendered = choose_documents(
            told, datasets.read_documents(told, folder, locked), template, tokenizer
        )
        return write_text_files(rendered, template, tokenizer, settings.context, partial)

    done = store.run_once("calibrate", inputs, make)
    facts = dict(done.facts)
    path, receipt, held = done.path(TEXT), done.receipt(TEXT), done.path(HELD_OUT)
    return CalibrationText(
        path, receipt, told.name, facts["documents"], facts["tokens"], facts, held
    )


def check_set(name: str) -> None:
    """Raise InputError for a set that cannot be read, before anything costly is begun."""
    told, folder = sets.find_set(name)
    datasets.read_dataset_lock(told, folder)


def choose_documents(
    told: CalibrationSet,
    documents: Sequence[Document],
    template: ChatTemplate | None,
    counter: TextCounter,
) -> RenderedDocument:
    """The documents of a set that are read, rendered and counted, and those that are held out.

    Raises InputError with every document that the template refuses.
    """
    distinct = dedupe.drop_duplicates(packing.order_of(told, documents))
    read, held = packing.split_held_out(told, distinct)
    texts = _all_as_read(read, template)
    tokens = counter.counts(texts)
    chosen = packing.draw_documents(told, read, tokens)
    rendered = zip(held, _all_as_read(held, template), strict=True)
    return RenderedDocument(
        told,
        tuple(read[n] for n in chosen),
        tuple(texts[n] for n in chosen),
        tuple(tokens[n] for n in chosen),
        tuple(HeldOutText(d.id, d.source, d.kind, d.language, text) for d, text in rendered),
        len(documents) - len(distinct),
    )


def write_text_files(
    rendered: RenderedDocument,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    context: int,
    folder: Path,
) -> dict[str, Any]:
    """Write the text and the held-out part into a folder, and say what is in them."""
    pieces = _pieces(rendered, find_turn_marker(template), tokenizer, context)
    packed = packing.pack_chunks([n for _, n in pieces], context, context - tokenizer.begins)
    text = "".join(pieces[n][0] for n in packed.order)
    files.write_text(folder / TEXT, text)
    lines = [json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in rendered.held_out]
    files.write_text(folder / HELD_OUT, "".join(lines))
    about = rendered.json()
    return about | {
        "documents": len(rendered.read),
        "characters": len(text),
        "tokens": tokenizer.count(text),
        "pieces": len(pieces),
        "needless_cuts": packed.cuts,
        "held_out_sha256": files.hash_file(folder / HELD_OUT),
    }


def held_out_texts(path: Path, kind: str | None = None) -> tuple[HeldOutText, ...]:
    """The documents that were held out when a text was made, all or those of one kind."""
    found = (HeldOutText(**json.loads(line)) for line in path.read_text().split("\n") if line)
    return tuple(d for d in found if kind in (None, d.kind))


def render_for_model(document: Document, template: ChatTemplate | None) -> str:
    """One document as the model reads it; without a template, its messages as plain paragraphs."""
    if document.text is not None:
        return document.text
    if template is None:
        return "\n\n".join(str(m.get("content") or "") for m in document.messages)
    messages, tools = list(document.messages), list(document.tools) or None
    try:
        return render_template(
            template.text, messages, tools=tools, enable_thinking=document.thinking
        )
    except InputError as e:
        where = f"{document.source}: {document.id}" if document.source else document.id
        raise InputError(f"calibration document {where}: {e}") from e


def find_turn_marker(template: ChatTemplate | None) -> str:
    """What a template writes before a turn of the user; nothing where that cannot be told."""
    if template is None:
        return ""
    said = [{"role": "user", "content": "«1»"}, {"role": "assistant", "content": "«2»"}]
    try:
        ended = render_template(template.text, said, tools=None, enable_thinking=False)
        whole = render_template(
            template.text,
            [*said, {"role": "user", "content": "«3»"}],
            tools=None,
            enable_thinking=False,
        )
    except InputError:
        return ""
    end = ended.partition("«2»")[2]
    return whole.partition("«2»")[2].partition("«3»")[0].removeprefix(end)


def _all_as_read(documents: Sequence[Document], template: ChatTemplate | None) -> tuple[str, ...]:
    """Every document, with a line's end behind it."""
    problems: list[str] = []

    def texts() -> Iterator[str]:
        for document in documents:
            try:
                yield render_for_model(document, template) + "\n"
            except InputError as e:
                problems.extend(e.problems)

    found = tuple(texts())
    raise_problems(problems)
    return found


def _pieces(
    rendered: RenderedDocument, marker: str, tokenizer: Tokenizer, context: int
) -> list[tuple[str, int]]:
    """The texts with their tokens; what is longer than a chunk is cut between exchanges."""
    long = {
        n: packing.list_exchanges(t, marker)
        for n, t in enumerate(rendered.texts)
        if rendered.tokens[n] > context
    }
    counted = iter(tokenizer.counts([part for parts in long.values() for part in parts]))
    pieces: list[tuple[str, int]] = []
    for n, text in enumerate(rendered.texts):
        if n not in long:
            pieces.append((text, rendered.tokens[n]))
            continue
        sizes = [next(counted) for _ in long[n]]
        pieces += (
            ("".join(long[n][k] for k in group), sum(sizes[k] for k in group))
            for group in packing.group_documents(sizes, context)
        )
    return pieces
