"""Render a calibration set with the model's own, patched chat template.

The result is the text that the importance matrix is computed on, packed into chunks; the held-out
documents, rendered too, which no importance matrix sees; and facts about both for the manifest.
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
from quant.core.errors import InputError, raise_problems
from quant.core.files import Receipt
from quant.core.format import hash_texts, to_canonical_json
from quant.core.store import Store
from quant.llama.model_file import ModelFile
from quant.llama.tokenizer import TextCounter, Tokenizer
from quant.llama.toolchain import Toolchain
from quant.plan.recipe import ImatrixRecipe, ModelRecipe

TEXT, HELD_OUT = "calibration.txt", "held-out.jsonl"
HOW = "packed 1"
"""Version of the packing. Raise it when the same set gives another text."""


@dataclass(frozen=True)
class CalibrationText:
    """The text that a model reads while its activations are measured."""

    path: Path
    receipt: Receipt
    name: str
    """Name of the set."""
    documents: int
    tokens: int
    """As the model's vocabulary counts them."""
    facts: Mapping[str, Any]
    """Documents, tokens and shares by source, as plain JSON."""
    held_out: Path | None = None
    """Held-out documents as JSON lines: see :func:`read_held_out_texts`."""

    def json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        entry = {
            "set": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "sha256": self.receipt.sha256,
        }
        return entry | {k: v for k, v in self.facts.items() if k not in entry}


@dataclass(frozen=True)
class HeldOutText:
    """A rendered document that no importance matrix sees."""

    id: str
    source: str
    kind: str
    language: str
    text: str


@dataclass(frozen=True)
class RenderedSet:
    """The chosen documents of a set with their rendered texts, and the held-out ones."""

    calibration_set: CalibrationSet
    documents: tuple[Document, ...]
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    held_out: tuple[HeldOutText, ...]
    duplicates: int
    """Number of documents that were dropped as near duplicates."""

    def json(self) -> dict[str, Any]:
        """Return documents, tokens and shares by source. These keys go into manifests."""
        totals = packing.count_by_source(self.documents, self.tokens)
        total = max(sum(self.tokens), 1)
        sources = []
        for source in self.calibration_set.source:
            documents, tokens = totals.get(source.name, (0, 0))
            entry: dict[str, Any] = {
                "name": source.name,
                "kind": source.kind,
                "licence": source.license,  # the manifest's key, from before the recipes' key
                "attribution": source.attribution,
                "repo": source.repo,
                "documents": documents,
                "tokens": tokens,
                "share": round(tokens / total, 4),
                "share_wanted": source.share,
            }
            sources.append({k: v for k, v in entry.items() if v not in (None, "")})
        return {
            "near_duplicates": self.duplicates,
            "held_out": len(self.held_out),
            "sources": sources,
        }


def build_calibration_text(
    model: ModelRecipe,
    template: ChatTemplate | None,
    base: ModelFile,
    tools: Toolchain,
    store: Store,
) -> CalibrationText:
    """Build the calibration text of a model: :func:`build_set_text` with its recipe's settings."""
    return build_set_text(model.imatrix, template, base, tools, store)


def build_set_text(
    settings: ImatrixRecipe,
    template: ChatTemplate | None,
    base: ModelFile,
    tools: Toolchain,
    store: Store,
) -> CalibrationText:
    """Build the text of a calibration set, with special tokens written out.

    The same set, template, vocabulary and context give the same bytes.

    Args:
        settings: The set's name and the context, in tokens.
        template: The chat template. None renders messages as paragraphs.
        base: A model with the vocabulary.
        tools: For llama-tokenize.
        store: Keeps the text.

    Raises:
        InputError: The set or one of its documents is broken, or the template refuses a document.
        CheckError: A dataset has other content than was locked.
    """
    calibration_set, folder = sets.find_set(settings.calibration)
    lock = datasets.read_dataset_lock(calibration_set, folder)
    tokenizer = Tokenizer(base, tools)
    set_inputs = datasets.describe_set_inputs(calibration_set, folder, lock)
    inputs = {
        "set": hash_texts([to_canonical_json(set_inputs)]),
        "template": template.sha256 if template else None,
        "tokenizer": tokenizer.digest,
        "context": settings.context,
        "how": HOW,
    }

    def make(partial: Path) -> dict[str, Any]:
        documents = datasets.read_documents(calibration_set, folder, lock)
        rendered = render_set(calibration_set, documents, template, tokenizer)
        return write_text_files(rendered, template, tokenizer, settings.context, partial)

    result = store.run_once("calibrate", inputs, make)
    facts = dict(result.facts)
    return CalibrationText(
        path=result.path(TEXT),
        receipt=result.receipt(TEXT),
        name=calibration_set.name,
        documents=facts["documents"],
        tokens=facts["tokens"],
        facts=facts,
        held_out=result.path(HELD_OUT),
    )


def check_set(name: str) -> None:
    """Raise InputError if a set or its lock cannot be read. It costs little: call it first."""
    calibration_set, folder = sets.find_set(name)
    datasets.read_dataset_lock(calibration_set, folder)


def render_set(
    calibration_set: CalibrationSet,
    documents: Sequence[Document],
    template: ChatTemplate | None,
    counter: TextCounter,
) -> RenderedSet:
    """Drop near duplicates, hold documents out, render, and draw each source's share.

    Args:
        calibration_set: Shares, tokens and seed.
        documents: All documents of the set.
        template: The chat template. None renders messages as paragraphs.
        counter: Counts the tokens of texts.

    Raises:
        InputError: The template refuses documents. Each of them is listed.
    """
    # The order matters. Shuffled first, so that ids and seed decide which of two duplicates stays.
    # Held out last, so that no near duplicate of a held-out document is read.
    distinct = dedupe.drop_duplicates(packing.shuffle_documents(calibration_set, documents))
    read, held_out = packing.split_held_out(calibration_set, distinct)
    texts = _render_documents(read, template)
    tokens = counter.count_each(texts)
    chosen = packing.draw_documents(calibration_set, read, tokens)
    held_out_texts = zip(held_out, _render_documents(held_out, template), strict=True)
    return RenderedSet(
        calibration_set=calibration_set,
        documents=tuple(read[n] for n in chosen),
        texts=tuple(texts[n] for n in chosen),
        tokens=tuple(tokens[n] for n in chosen),
        held_out=tuple(
            HeldOutText(d.id, d.source, d.kind, d.language, text) for d, text in held_out_texts
        ),
        duplicates=len(documents) - len(distinct),
    )


def write_text_files(
    rendered: RenderedSet,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    context: int,
    folder: Path,
) -> dict[str, Any]:
    """Write the packed text and the held-out documents into a folder, and return facts on them."""
    pieces = _split_into_pieces(rendered, find_turn_marker(template), tokenizer, context)
    # A BOS token takes one place of the first chunk.
    packed = packing.pack_chunks([n for _, n in pieces], context, context - tokenizer.adds_bos)
    text = "".join(pieces[n][0] for n in packed.order)
    files.write_text(folder / TEXT, text)
    lines = [json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in rendered.held_out]
    files.write_text(folder / HELD_OUT, "".join(lines))
    return rendered.json() | {
        "documents": len(rendered.documents),
        "characters": len(text),
        # Counted as one text: the sum of the pieces lacks BOS, and tokens may merge where pieces
        # meet.
        "tokens": tokenizer.count(text),
        "pieces": len(pieces),
        "needless_cuts": packed.cuts,
        "held_out_sha256": files.hash_file(folder / HELD_OUT),
    }


def read_held_out_texts(path: Path, kind: str | None = None) -> tuple[HeldOutText, ...]:
    """Read the held-out documents of a calibration text: those of one kind, or all."""
    # Not splitlines(): the JSON may contain U+2028, which is a line end for Python.
    texts = (HeldOutText(**json.loads(line)) for line in path.read_text().split("\n") if line)
    return tuple(d for d in texts if kind in (None, d.kind))


def render_document(document: Document, template: ChatTemplate | None) -> str:
    """Render one document as the model reads it.

    Args:
        document: A conversation or a plain text. A plain text is returned as it is.
        template: The chat template. None joins the messages as paragraphs.

    Raises:
        InputError: The template refuses the document.
    """
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
    """Return what a template writes before a user turn. Empty if that cannot be found out.

    Two conversations are rendered, one of which goes on with a user turn. What follows the answer
    in the longer one, up to that turn's text, is the end of the answer and the marker; what follows
    it in the shorter one is only the end.
    """
    if template is None:
        return ""
    turns = [{"role": "user", "content": "«1»"}, {"role": "assistant", "content": "«2»"}]
    next_turn = {"role": "user", "content": "«3»"}
    try:
        short, long = (
            render_template(template.text, messages, tools=None, enable_thinking=False)
            for messages in (turns, [*turns, next_turn])
        )
    except InputError:
        return ""
    end = short.partition("«2»")[2]
    return long.partition("«2»")[2].partition("«3»")[0].removeprefix(end)


def _render_documents(
    documents: Sequence[Document], template: ChatTemplate | None
) -> tuple[str, ...]:
    """Render documents, each with a final newline. Raise InputError with every refused one."""
    problems: list[str] = []

    def render_all() -> Iterator[str]:
        for document in documents:
            try:
                yield render_document(document, template) + "\n"
            except InputError as e:
                problems.extend(e.problems)

    texts = tuple(render_all())
    raise_problems(problems)
    return texts


def _split_into_pieces(
    rendered: RenderedSet, marker: str, tokenizer: Tokenizer, context: int
) -> list[tuple[str, int]]:
    """Return texts with their tokens. A text longer than a chunk is split between exchanges."""
    long = {
        n: packing.split_exchanges(text, marker)
        for n, text in enumerate(rendered.texts)
        if rendered.tokens[n] > context
    }
    # One call counts the exchanges of all documents: a call starts llama-tokenize.
    counts = iter(tokenizer.count_each([part for parts in long.values() for part in parts]))
    pieces: list[tuple[str, int]] = []
    for n, text in enumerate(rendered.texts):
        if n not in long:
            pieces.append((text, rendered.tokens[n]))
            continue
        sizes = [next(counts) for _ in long[n]]
        pieces += (
            ("".join(long[n][k] for k in group), sum(sizes[k] for k in group))
            for group in packing.group_exchanges(sizes, context)
        )
    return pieces
