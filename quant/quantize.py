"""Quantise the BF16 file into one variant by calling llama-quantize with an explicit type for every tensor.

What it wrote is read back and compared with the plan: names, shapes, types, order and length.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant import files
from quant.convert import Base
from quant.errors import CheckFailed, InputError
from quant.files import Receipt
from quant.footprint import MATRIX_NAME, forecast_bytes, stored_shape
from quant.header import Header, read_header
from quant.imatrix import ImportanceMatrix
from quant.plan import Plan
from quant.store import Store
from quant.toolchain import Toolchain

RESERVE_BYTES = 64 * 2**20
"""Room that is left on the disk beside a planned file."""


@dataclass(frozen=True)
class Quantized:
    """One variant as one file."""

    plan: Plan
    path: Path
    receipt: Receipt


def quantize(base: Base, matrix: ImportanceMatrix, plan: Plan, title: str, tools: Toolchain, store: Store) -> Quantized:
    """The variant that a plan describes. Raises ToolError, InputError for a full disk, CheckFailed for a wrong result."""
    if plan.is_base:
        return Quantized(plan, base.path, base.receipt)
    inputs = {
        "base": base.receipt.sha256,
        "imatrix": matrix.receipt.sha256,
        "types": plan.types(),
        "file_type": plan.variant.file_type,
        "llama.cpp": str(tools.version),
    }
    name = f"{title}-{plan.variant.name}.gguf"
    done = store.once(
        "quantize",
        inputs | {"name": name},
        lambda partial: write_variant(base.path, matrix.path, plan, tools, partial / name),
    )
    return Quantized(plan, done.path(name), done.receipt(name))


def write_variant(
    base: Path, matrix: Path, plan: Plan, tools: Toolchain, out: Path, jobs: int | None = None
) -> dict[str, Any]:
    """Write the planned variant at ``out``, whose folder belongs to this work."""
    expected_bytes = forecast_bytes(plan, read_header(base), read_header(matrix))
    _check_room(out.parent, expected_bytes)
    chosen = {t.tensor.name: t.type.name for t in plan.tensors if t.rule is not None}
    files.write_text(out.parent / "types.txt", type_file(chosen))
    # Its path is published in the file, so the matrix is called by a name and not by a path of this machine.
    files.share(matrix, out.parent / MATRIX_NAME)
    tools.run(
        "llama-quantize",
        ["--imatrix", MATRIX_NAME, "--tensor-type-file", "types.txt", base, out.name, plan.variant.file_type,
         str(jobs or os.cpu_count() or 1)],
        cwd=out.parent, log=out.parent / "log",
    )  # fmt: skip
    files.remove(out.parent / MATRIX_NAME)
    if wrong := list(differences(plan, read_header(out), expected_bytes)):
        raise CheckFailed(*wrong)
    return {"file_type": plan.variant.file_type, "bytes_by_type": plan.type_bytes()}


def type_file(types: Mapping[str, str]) -> str:
    """The ``--tensor-type-file`` that means exactly this table.

    llama-quantize searches every name with a regular expression that is not anchored and takes the first hit, so
    ``blk.1`` would also be ``blk.11``: every name is escaped and anchored.
    """
    return "".join(f"^{re.escape(name)}$={ggml_type.lower()}\n" for name, ggml_type in types.items())


def differences(plan: Plan, header: Header, whole_bytes: int | None = None) -> Iterator[str]:
    """Everything in which a written file is not the planned one; without its forecast, its head may be of any length."""
    found = {t.name: (stored_shape(t), t.type.name) for t in header.tensors}
    expected = {t.tensor.name: (stored_shape(t.tensor), t.type.name) for t in plan.tensors}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{header.path}: tensor {name}: expected {expected.get(name)}, found {found.get(name)}"
    pairs = zip(expected, found, strict=False)
    if found == expected and (moved := next((pair for pair in pairs if pair[0] != pair[1]), None)):
        yield f"{header.path}: order of tensors: expected {moved[0]}, found {moved[1]}"
    wanted = header.data_start + plan.bytes if whole_bytes is None else whole_bytes
    if found == expected and (size := header.path.stat().st_size) != wanted:
        yield f"{header.path}: expected {wanted} bytes, found {size}"


def _check_room(folder: Path, planned_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < planned_bytes + RESERVE_BYTES:
        raise InputError(
            f"{folder}: expected {planned_bytes + RESERVE_BYTES} bytes free, found {free}; free some and run again"
        )
