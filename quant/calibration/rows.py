"""Read the rows of dataset files: JSON lines, JSON, Parquet, plain text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quant.calibration.documents import read_json_lines, read_text_file
from quant.calibration.forms import NumberedRow
from quant.core.errors import InputError

TEXT_CHARACTERS = 4000
"""A plain text is cut between paragraphs into documents of about this length."""


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield every row of a file, in order.

    Raises:
        InputError: The file has another format than its suffix, or a row is broken. File and row
            are named.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(READERS)}, found"
            f" {path.suffix or 'no ending'}"
        )
    for number, row in reader(path):
        yield NumberedRow(row, f"{path}:{number}", f"{path.stem}-{number}")


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(read_text_file(path))
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {str(row)[:40]}")
        yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Imported here: it brings pyarrow and pandas, which sets without Parquet do not need.
    from datasets.load import load_dataset

    with path.open("rb") as f:
        if f.read(4) != b"PAR1":
            raise InputError(f"{path}: expected Parquet, found something else")
    try:
        # Streaming copies nothing into a cache, and reads only the rows that are asked for.
        rows = load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield number, dict(row)
    except (OSError, ValueError, RuntimeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: expected Parquet, found something else ({reason})") from e


def _read_text(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield paragraphs, joined up to TEXT_CHARACTERS."""
    piece, number = "", 0
    for paragraph in read_text_file(path).split("\n\n"):
        if piece and len(piece) + len(paragraph) > TEXT_CHARACTERS:
            number += 1
            yield number, {"text": piece}
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece.strip():
        yield number + 1, {"text": piece}


READERS = {
    ".jsonl": read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
