"""Read the rows of files: JSON lines, JSON, Parquet, plain text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quant.calibration.documents import json_lines, render_text
from quant.calibration.forms import NumberedRow
from quant.errors import InputError

PARAGRAPHS_CHARACTERS = 4000
"""A plain text is cut between paragraphs into documents of about this length."""


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Every row of a file, in order. Raises InputError that names file and row."""
    kind = READERS.get(path.suffix)
    if kind is None:
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(READERS)}, found {path.suffix or 'no ending'}"
        )
    for number, row in kind(path):
        yield NumberedRow(row, f"{path}:{number}", f"{path.stem}-{number}")


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        found = json.loads(render_text(path))
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a list of rows, found {type(found).__name__}")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {str(row)[:40]}")
        yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets.load import load_dataset

    with path.open("rb") as f:
        if f.read(4) != b"PAR1":
            raise InputError(f"{path}: expected Parquet, found something else")
    try:
        # Streamed: nothing of it is copied into a cache, and only the rows that are asked for are read.
        found = load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        for number, row in enumerate(found, 1):
            yield number, dict(row)
    except (OSError, ValueError, RuntimeError) as e:
        said = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: expected Parquet, found something else ({said})") from e


def _text(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Paragraphs, joined to documents of some length."""
    piece, number = "", 0
    for paragraph in render_text(path).split("\n\n"):
        if piece and len(piece) + len(paragraph) > PARAGRAPHS_CHARACTERS:
            number += 1
            yield number, {"text": piece}
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece.strip():
        yield number + 1, {"text": piece}


READERS = {".jsonl": json_lines, ".json": _json, ".parquet": _parquet, ".txt": _text}
