"""The error table: what each type does to each tensor of one model."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.core import files
from quant.errors import InputError
from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES

FORMAT = "quant-distortion-1"
"""First thing in such a file."""


CANDIDATES = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
)
"""Types that an allocation chooses from, unless others are named."""


@dataclass(frozen=True)
class TensorError:
    """What one type does to one tensor."""

    share: float
    """Of the weighted squares, lost."""
    deviation: float
    """Standard error of that share; 0 where all rows were measured."""


@dataclass(frozen=True)
class ErrorTable:
    """The error database of one model and one importance matrix."""

    base: str
    """The sha256 of the BF16 file."""
    matrix: str | None
    """The sha256 of the imatrix."""
    errors: Mapping[str, Mapping[str, TensorError]]
    """By tensor and type; only types that the tensor may have."""
    squares: Mapping[str, float]
    """By tensor, the weighted squares that were there: shares times these are losses that can be added."""
    moments: str | None = None
    """The sha256 of the second moments by which rounding was fed back; none where it was not."""

    def only(self, types: Iterable[str]) -> "ErrorTable":
        """Without the other types."""
        wanted = frozenset(types)
        errors = {
            name: {k: e for k, e in by_type.items() if k in wanted}
            for name, by_type in self.errors.items()
        }
        return replace(self, errors=errors)

    def json(self) -> dict[str, Any]:
        """As it is written."""
        tensors = {
            name: {
                "squares": self.squares[name],
                "errors": {kind: [e.share, e.deviation] for kind, e in errors.items()},
            }
            for name, errors in self.errors.items()
        }
        seen = {"moments": self.moments} if self.moments else {}
        return {
            "form": FORMAT,
            "base": self.base,
            "imatrix": self.matrix,
            **seen,
            "tensors": tensors,
        }


def list_possible_types(
    tensor: TensorSpec, types: Iterable[str], *, covered: bool
) -> Iterator[str]:
    """The types that a tensor may have: its rows fill their blocks, and those that need importance have it."""
    yield from (
        n
        for n in types
        if TYPES[n].fits(tensor.shape[0]) and (covered or not TYPES[n].needs_imatrix)
    )


def write_error_table(path: Path, found: ErrorTable) -> None:
    """Write the database."""
    files.write_text(path, json.dumps(found.json(), indent=1) + "\n")


def read_error_table(path: Path, base: str | None = None) -> ErrorTable:
    """A database that was written before. Raises InputError for another file, and for another model's."""
    try:
        told = json.loads(path.read_text())
        if told["form"] != FORMAT:
            raise ValueError(f"form {told['form']!r}")
        tensors = told["tensors"].items()
        errors = {
            name: {kind: TensorError(*e) for kind, e in t["errors"].items()} for name, t in tensors
        }
        squares = {name: float(t["squares"]) for name, t in tensors}
        found = ErrorTable(told["base"], told["imatrix"], errors, squares, told.get("moments"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: expected an error database ({FORMAT}), found something else ({e})"
        ) from e
    if base and found.base != base:
        raise InputError(
            f"{path}: of another model: its base is {found.base[:12]}…, this one is {base[:12]}…"
        )
    return found


def check_hessian_digest(path: Path, measured: str | None, moments: Path | None) -> None:
    """Raise InputError for a file that was measured with other moments than those, or with some where there are none."""
    wanted = files.hash_file(moments) if moments else None
    if measured != wanted:
        expected, found = (
            f"fed back by moments {d[:12]}…" if d else "with ggml's rounding"
            for d in (wanted, measured)
        )
        raise InputError(
            f"{path}: expected what was measured {expected}, found {found}; name another file, or take it away"
        )
