"""ggml's bytes, sooner: for every type the fastest kernel that writes what the loaded ggml writes.

The kernels of this package (native/) do the arithmetic of ggml's quantisers in its own order, on many superblocks side by
side. A type is served by one of them only after it wrote the same bytes as the ggml that is loaded for some hundred
blocks; otherwise, and for every type that has none, ggml itself serves, and the reason is told.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.errors import ToolError
from quant.llama import ggml
from quant.llama.ggml import Bytes, Kernel, Rows
from quant.llama.types import GGMLType
from quant.quantize.kernels import trial
from quant.quantize.kernels.library import CountedKernel, NativeLibrary, load_library


@dataclass(frozen=True)
class KernelChoice:
    """By what a type is quantised."""

    by: str
    """An instruction set, or ``ggml``."""
    why: str = ""
    """Why it is ggml; empty otherwise."""


@dataclass
class Kernels:
    """The kernels for one ggml library. May be shared by threads.

    Raises ToolError in a process whose arithmetic would change ggml's bytes.
    """

    library: ggml.Library
    native: NativeLibrary = field(default_factory=load_library)
    odd: Counter[str] = field(default_factory=Counter)
    """By type: blocks that were left to ggml because of the numbers in them."""
    faulty: dict[str, Counter[str]] = field(default_factory=dict)
    """By type and place: blocks that met a fault of ggml's, which is written as ggml writes it."""

    def __post_init__(self) -> None:
        if self.native.flushes():
            raise ToolError(
                "this process takes denormal numbers for zero, or does not round to nearest: quantised bytes would not "
                "be llama-quantize's; a library that it loaded was built with -ffast-math"
            )
        self.lock = threading.Lock()
        self.here = threading.local()
        self.chosen: dict[str, tuple[KernelChoice, Kernel]] = {}

    def kernel(self, ggml_type: GGMLType) -> Kernel:
        """What turns rows into stored rows of that type, the fastest way that there is."""
        return self._choose(ggml_type)[1]

    def served(self, ggml_type: GGMLType) -> KernelChoice:
        """By what that type is quantised."""
        return self._choose(ggml_type)[0]

    def waiting(self, ggml_type: GGMLType) -> bool:
        """Whether a kernel for that type was never tried, and trying it takes long."""
        names = [f"{i} {ggml_type.name}" for i in self.native.sets if self.native.has(i, ggml_type)]
        tried = (
            trial.is_cached(self.library, name, self.native.path) is not None for name in names
        )
        return bool(names) and ggml_type.name in trial.SLOW and not any(tried)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """What this thread meets meanwhile is met there: in a tensor, say."""
        self.here.place = place
        try:
            yield
        finally:
            self.here.place = ""

    def report(self) -> Mapping[str, Any]:
        """By what the types were quantised so far, and what was met."""
        with self.lock:
            served = {name: vars(served) for name, (served, _) in sorted(self.chosen.items())}
            return {
                "served": served,
                "odd": dict(self.odd),
                "faulty": {t: dict(c) for t, c in self.faulty.items()},
            }

    def _choose(self, ggml_type: GGMLType) -> tuple[KernelChoice, Kernel]:
        with self.lock:
            if ggml_type.name not in self.chosen:
                self.chosen[ggml_type.name] = self._tried(ggml_type)
            return self.chosen[ggml_type.name]

    def _tried(self, ggml_type: GGMLType) -> tuple[KernelChoice, Kernel]:
        """The first kernel for that type that passes its trial, else ggml.

        ggml builds its tables here only where it serves; otherwise when the first odd block needs them.
        """
        why = self.native.problem or f"there is no kernel for {ggml_type.name}"
        for instructions in self.native.sets:
            if not self.native.has(instructions, ggml_type):
                continue
            kernel = self.native.kernel(self.library, instructions, ggml_type)
            name = f"{instructions} {ggml_type.name}"
            wrong = trial.cached_difference(self.library, ggml_type, kernel, name, self.native.path)
            if not wrong:
                return KernelChoice(instructions), self._counting(ggml_type, kernel)
            why = f"{instructions}: {wrong}"
        self.library.initialize(ggml_type)
        return KernelChoice("ggml", why), self.library.kernel(ggml_type)

    def _counting(self, ggml_type: GGMLType, kernel: CountedKernel) -> Kernel:
        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> Bytes:
            data, counts = kernel(rows, weights)
            if counts.odd or counts.faulty:
                with self.lock:
                    self.odd[ggml_type.name] += counts.odd
                    if counts.faulty:
                        self.faulty.setdefault(ggml_type.name, Counter())[
                            getattr(self.here, "place", "")
                        ] += counts.faulty
            return data

        return quantize
