"""ggml's bytes, sooner: for every type the fastest kernel that writes what the loaded ggml writes.

The kernels of this package (native/) do the arithmetic of ggml's quantisers in its own order, on many superblocks side by
side. A type is served by one of them only after it wrote the same bytes as the ggml that is loaded for some hundred
blocks; otherwise, and for every type that has none, ggml itself serves, and the reason is told.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quant import ggml
from quant.ggml import Bytes, Kernel, Rows
from quant.ggml_types import GGMLType
from quant.kernels import trial
from quant.kernels.library import Counted, Native, load


@dataclass(frozen=True)
class Served:
    """By what a type is quantised."""

    by: str
    """An instruction set, or ``ggml``."""
    why: str = ""
    """Why it is ggml; empty otherwise."""


@dataclass
class Kernels:
    """The kernels for one ggml library. May be shared by threads."""

    library: ggml.Library
    native: Native = field(default_factory=load)
    odd: Counter[str] = field(default_factory=Counter)
    """By type: blocks that were left to ggml because of the numbers in them."""
    faulty: Counter[str] = field(default_factory=Counter)
    """By type: blocks that met a fault of ggml's."""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.chosen: dict[str, tuple[Served, Kernel]] = {}

    def kernel(self, ggml_type: GGMLType) -> Kernel:
        """What turns rows into stored rows of that type, the fastest way that there is."""
        return self._choose(ggml_type)[1]

    def served(self, ggml_type: GGMLType) -> Served:
        """By what that type is quantised."""
        return self._choose(ggml_type)[0]

    def _choose(self, ggml_type: GGMLType) -> tuple[Served, Kernel]:
        with self.lock:
            if ggml_type.name not in self.chosen:
                self.chosen[ggml_type.name] = self._tried(ggml_type)
            return self.chosen[ggml_type.name]

    def _tried(self, ggml_type: GGMLType) -> tuple[Served, Kernel]:
        """The first kernel for that type that passes its trial; ggml's is initialised only where it serves."""
        why = self.native.problem or f"there is no kernel for {ggml_type.name}"
        for instructions in self.native.sets:
            if not self.native.has(instructions, ggml_type):
                continue
            kernel = self.native.kernel(self.library, instructions, ggml_type)
            if not (difference := trial.difference(self.library, ggml_type, kernel)):
                return Served(instructions), self._counting(ggml_type, kernel)
            why = f"{instructions}: {difference}"
        self.library.initialise(ggml_type)
        return Served("ggml", why), self.library.kernel(ggml_type)

    def _counting(self, ggml_type: GGMLType, kernel: Counted) -> Kernel:
        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> Bytes:
            data, counts = kernel(rows, weights)
            if counts.odd or counts.faulty:
                with self.lock:
                    self.odd[ggml_type.name] += counts.odd
                    self.faulty[ggml_type.name] += counts.faulty
            return data

        return quantize
