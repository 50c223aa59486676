"""The error table: the quantization error of each type on each tensor of one model.

Measured by ``quant.evaluate.error_measurement``, once for a model and an imatrix. The file may be
published and used again; its keys are a format.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.errors import InputError
from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES

# An older name of the error table, as "moments" is one of Hessians: existing files have them.
FORMAT = "quant-distortion-1"
"""Value of the key ``form``, by which such a file is recognized."""

# Without Q4_0 to Q5_1: K types of the same bits have less error (quant.plan.priors), and IQ4_NL and
# Q8_0 take rows that are no multiple of 256.
CANDIDATES = (
    *("IQ1_S", "IQ1_M"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K"),
    *("IQ3_XXS", "IQ3_S", "Q3_K"),
    *("IQ4_XS", "IQ4_NL", "Q4_K"),
    *("Q5_K", "Q6_K", "Q8_0"),
)
"""Types that an allocation chooses from, unless others are named."""


@dataclass(frozen=True)
class TensorError:
    """The quantization error of one type on one tensor."""

    relative_mse: float
    """Relative weighted MSE: Σ h (w − q)² / Σ h w², where h is the importance of a column."""
    standard_error: float
    """Standard error of ``relative_mse``; 0 where all rows were measured."""


@dataclass(frozen=True)
class ErrorTable:
    """Quantization errors for one model and one importance matrix."""

    base: str
    """sha256 of the BF16 file."""
    imatrix: str | None
    """sha256 of the imatrix."""
    errors: Mapping[str, Mapping[str, TensorError]]
    """By tensor and type; a tensor has only the types that it may get."""
    squares: Mapping[str, float]
    """Σ h w² by tensor: a relative error times this is an absolute one, comparable over tensors."""
    hessians: str | None = None
    """sha256 of the Hessians that error compensation (GPTQ) used; None without compensation."""

    def select_types(self, types: Iterable[str]) -> "ErrorTable":
        """Return the table with these types alone."""
        selected = frozenset(types)
        errors = {
            name: {kind: e for kind, e in by_type.items() if kind in selected}
            for name, by_type in self.errors.items()
        }
        return replace(self, errors=errors)

    def json(self) -> dict[str, Any]:
        """Return the table as plain JSON values, as the file has them."""
        tensors = {
            name: {
                "squares": self.squares[name],
                "errors": {k: [e.relative_mse, e.standard_error] for k, e in errors.items()},
            }
            for name, errors in self.errors.items()
        }
        compensation = {"moments": self.hessians} if self.hessians else {}
        digests = {"base": self.base, "imatrix": self.imatrix, **compensation}
        return {"form": FORMAT, **digests, "tensors": tensors}


def list_possible_types(
    tensor: TensorSpec, types: Iterable[str], *, covered: bool
) -> Iterator[str]:
    """Yield the types that a tensor may get: rows fill the blocks, and imatrix data is there.

    Args:
        tensor: The tensor.
        types: Names of ggml types.
        covered: Whether the imatrix has data for the tensor.
    """
    for name in types:
        if TYPES[name].fits(tensor.shape[0]) and (covered or not TYPES[name].needs_imatrix):
            yield name


def write_error_table(path: Path, table: ErrorTable) -> None:
    """Write an error table as JSON."""
    files.write_text(path, json.dumps(table.json(), indent=1) + "\n")


def read_error_table(path: Path, base: str | None = None) -> ErrorTable:
    """Return an error table that ``write_error_table`` wrote.

    Args:
        path: The file.
        base: sha256 of the BF16 file that the table must be of; None accepts any.

    Raises:
        InputError: The file cannot be read, is something else, or belongs to another model.
    """
    try:
        document = json.loads(path.read_text())
        if document["form"] != FORMAT:
            raise ValueError(f"form {document['form']!r}")
        tensors = document["tensors"].items()
        table = ErrorTable(
            base=document["base"],
            imatrix=document["imatrix"],
            errors={
                name: {kind: TensorError(*e) for kind, e in t["errors"].items()}
                for name, t in tensors
            },
            squares={name: float(t["squares"]) for name, t in tensors},
            hessians=document.get("moments"),
        )
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: expected an error database ({FORMAT}), found something else ({e})"
        ) from e
    check_base(path, table.base, base)
    return table


def check_base(path: Path, actual: str, expected: str | None) -> None:
    """Raise InputError if a file's measurements are of another BF16 file than the expected one."""
    if expected and actual != expected:
        raise InputError(
            f"{path}: of another model: its base is {actual[:12]}…, this one is {expected[:12]}…"
        )


def check_hessian_digest(path: Path, actual: str | None, hessians: Path | None) -> None:
    """Raise InputError if a table was measured with other Hessians, or without the ones given.

    Args:
        path: The error table's file, for the message.
        actual: sha256 of the Hessians that it was measured with.
        hessians: The Hessians of this run; None without error compensation.
    """
    expected = files.hash_file(hessians) if hessians else None
    if actual != expected:
        texts = [
            f"error compensation by {d[:12]}…" if d else "ggml's rounding"
            for d in (expected, actual)
        ]
        raise InputError(
            f"{path}: expected errors measured with {texts[0]}, found {texts[1]};"
            " name another file, or delete it"
        )
