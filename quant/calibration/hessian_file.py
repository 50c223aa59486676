"""The Hessian file: open it, check it, and read the Hessian of one matrix.

A Hessian is H = Σ x xᵀ over the rows x that go into a weight matrix. The file is safetensors:

- ``NAME``: H of the matrix called NAME in GGUF, F32, (columns, columns), or (experts, columns,
  columns);
- ``NAME.counts``: the number of rows in each sum, I64, (experts,);
- metadata: one key, ``moments``, with the origin of the file as JSON.

H grows with the square of the number of columns, so it is read one expert at a time.

This module is light on purpose: the quantizer imports it, and nothing here needs the modules that
compute Hessians.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quant.core.errors import InputError, raise_problems

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORM = "quant-moments-1"
"""Version of the format. The name is older than this module: files that exist carry it."""
METADATA_KEY = "moments"
"""The only key of the metadata. safetensors does not keep the order of several keys, so two equal
files could differ in their bytes."""
COUNTS = ".counts"
FEWEST_ROWS = 32
"""An expert that saw fewer rows has no usable Hessian."""


@dataclass(frozen=True)
class Hessians:
    """An open Hessian file."""

    path: Path
    about: Mapping[str, Any]
    """Origin: digests of base and text, context, chunks, and the version of llama.cpp."""
    counts: Mapping[str, "NDArray[np.int64]"]
    """Rows by matrix and expert, one number for a matrix without experts. With gradients this is
    the effective sample size."""
    file: Any = field(repr=False)

    @classmethod
    def open(cls, path: Path, base_digest: str | None = None) -> "Hessians":
        """Open a Hessian file and check it.

        Args:
            path: The file.
            base_digest: Digest of the model that it has to belong to. None accepts any model.

        Raises:
            InputError: The file cannot be read, is damaged, has another format, or belongs to
                another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            file: Any = safe_open(path, "numpy")
            about: dict[str, Any] = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror or e})") from e
        except (SafetensorError, ValueError) as e:
            raise InputError(
                f"{path}: expected a Hessian file, found another or a damaged file ({e})"
            ) from e
        if (form := about.get("form")) != FORM:
            raise InputError(
                f"{path}: form: expected {FORM}, found {form}; compute it again with"
                " `quant hessians`"
            )
        if base_digest and about.get("base") != base_digest:
            raise InputError(
                f"{path}: of another model: expected Hessians of the base {base_digest}, found"
                f" those of {about.get('base')}; compute them again with `quant hessians`"
            )
        raise_problems(_find_problems(path, file))
        names = [name for name in _list_names(file) if not name.endswith(COUNTS)]
        counts = {name: file.get_tensor(name + COUNTS) for name in sorted(names)}
        return cls(path, about, counts, file)

    def columns(self, name: str) -> int | None:
        """Return the number of columns of a matrix. None if the file does not have it."""
        return int(self.file.get_slice(name).get_shape()[-1]) if name in self.counts else None

    def read_mean(self, name: str, expert: int = 0) -> "NDArray[np.float32] | None":
        """Read the mean of x xᵀ over the rows that went into one expert of a matrix.

        Returns:
            An array (columns, columns). None for a matrix that the file does not have, and for an
            expert that saw fewer than FEWEST_ROWS rows.

        Raises:
            InputError: A value is NaN or infinite.
        """
        if name not in self.counts or (count := self.counts[name][expert]) < FEWEST_ROWS:
            return None
        part = self.file.get_slice(name)
        sums = part[expert] if len(part.get_shape()) > 2 else part[:]
        if not np.isfinite(sums).all():
            raise InputError(
                f"{self.path}: {name}: expected finite numbers, found NaN or infinity; compute it"
                " again"
            )
        mean: NDArray[np.float32] = sums / np.float32(count)
        return mean


def _list_names(file: Any) -> list[str]:
    """Return the names of all tensors of an open safetensors file, which is no mapping."""
    return [*file.keys()]


def _find_problems(path: Path, file: Any) -> Iterator[str]:
    """Yield everything in which the tensors do not have the format."""
    slices = {name: file.get_slice(name) for name in _list_names(file)}
    shapes = {name: (s.get_shape(), s.get_dtype()) for name, s in slices.items()}
    for name, (shape, dtype) in shapes.items():
        if name.endswith(COUNTS):
            if (matrix := name.removesuffix(COUNTS)) not in shapes:
                yield f"{path}: {name}: expected a matrix {matrix}, found none"
            continue
        experts = prod(shape[:-2])
        if dtype != "F32" or len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            yield f"{path}: {name}: expected square matrices in F32, found {shape} in {dtype}"
        if (counts := shapes.get(name + COUNTS)) != ([experts], "I64"):
            yield f"{path}: {name}{COUNTS}: expected {experts} numbers in I64, found {counts}"
