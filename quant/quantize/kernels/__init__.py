"""ggml's bytes, sooner: for every type the fastest kernel that writes what the loaded ggml writes.

```
native/  the kernels in C++: ggml's arithmetic in ggml's order, for many superblocks side by side
library  loads them, and says which instruction sets this processor has
trial    compares a kernel with the loaded ggml on some hundred blocks, and keeps the outcome
```

A kernel quantizes a type only after it wrote the same bytes as the loaded ggml in a trial.
Otherwise ggml itself does, and :attr:`KernelChoice.reason` says why. So another ggml, compiler or
processor never changes bytes, only speed.

The engine and error measurement call :class:`Kernels`; ``quant doctor`` prints its choices. Read
native/lanes.h and native/kernel.h before you change a kernel; tests/quant/quantize/kernels compares
it with ggml. `QUANT_KERNELS` chooses an instruction set, or ggml.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.core.errors import ToolError
from quant.llama import ggml
from quant.llama.ggml import Bytes, Kernel, Rows
from quant.llama.types import GGMLType
from quant.quantize.kernels import trial
from quant.quantize.kernels.library import CountedKernel, NativeLibrary, load_library


@dataclass(frozen=True)
class KernelChoice:
    """What quantizes a type."""

    source: str
    """An instruction set, or ``ggml``."""
    reason: str = ""
    """Why it is ggml; empty for a kernel of the project."""


@dataclass
class Kernels:
    """The kernels for one ggml library. Threads may share it.

    Raises:
        ToolError: This process's arithmetic would change ggml's bytes.
    """

    library: ggml.Library
    native: NativeLibrary = field(default_factory=load_library)
    odd: Counter[str] = field(default_factory=Counter)
    """Blocks that were left to ggml because of their numbers (infinities, denormals), by type."""
    faulty: dict[str, Counter[str]] = field(default_factory=dict)
    """Blocks that met a fault of ggml, which is reproduced, by type and tensor."""

    def __post_init__(self) -> None:
        if self.native.flushes_denormals():
            raise ToolError(
                "this process takes denormal numbers for zero, or does not round to nearest: "
                "quantized bytes would not be llama-quantize's; a library that it loaded was built "
                "with -ffast-math"
            )
        self.lock = threading.Lock()
        self.context = threading.local()
        self.choices: dict[str, tuple[KernelChoice, Kernel]] = {}

    def kernel(self, ggml_type: GGMLType) -> Kernel:
        """Return the fastest function that stores rows in the type with ggml's bytes."""
        return self._choose(ggml_type)[1]

    def choice(self, ggml_type: GGMLType) -> KernelChoice:
        """Return what quantizes the type."""
        return self._choose(ggml_type)[0]

    def needs_slow_trial(self, ggml_type: GGMLType) -> bool:
        """Return whether a kernel of the type has no trial yet, and the trial takes seconds."""
        names = [f"{i} {ggml_type.name}" for i in self.native.sets if self.native.has(i, ggml_type)]
        outcomes = (trial.read_cached(self.library, name, self.native.path) for name in names)
        is_slow = bool(names) and ggml_type.name in trial.SLOW_TYPES
        return is_slow and all(outcome is None for outcome in outcomes)

    @contextmanager
    def attribute_to(self, tensor: str) -> Iterator[None]:
        """Count faults that this thread meets while the block runs under the tensor's name."""
        self.context.tensor = tensor
        try:
            yield
        finally:
            self.context.tensor = ""

    def report(self) -> Mapping[str, Any]:
        """Return, as plain JSON, the choices so far and the counts of odd and faulty blocks."""
        with self.lock:
            choices = {name: vars(choice) for name, (choice, _) in sorted(self.choices.items())}
            return {
                "choices": choices,
                "odd": dict(self.odd),
                "faulty": {t: dict(c) for t, c in self.faulty.items()},
            }

    def _choose(self, ggml_type: GGMLType) -> tuple[KernelChoice, Kernel]:
        with self.lock:
            # A trial runs under the lock: threads that want the same type wait for it.
            if ggml_type.name not in self.choices:
                self.choices[ggml_type.name] = self._try_kernels(ggml_type)
            return self.choices[ggml_type.name]

    def _try_kernels(self, ggml_type: GGMLType) -> tuple[KernelChoice, Kernel]:
        """Return the first kernel of the type that passes its trial, else ggml's function.

        ggml's tables, which take seconds for some types, are built here only if ggml is chosen.
        Otherwise the first odd block builds them.
        """
        reason = self.native.problem or f"there is no kernel for {ggml_type.name}"
        # The widest instruction set first: it was the fastest for every type, or as fast.
        for instructions in self.native.sets:
            if not self.native.has(instructions, ggml_type):
                continue
            kernel = self.native.kernel(self.library, instructions, ggml_type)
            name = f"{instructions} {ggml_type.name}"
            difference = trial.find_difference(
                self.library, ggml_type, kernel, name, self.native.path
            )
            if not difference:
                return KernelChoice(instructions), self._count_blocks(ggml_type, kernel)
            reason = f"{instructions}: {difference}"
        self.library.initialize(ggml_type)
        return KernelChoice("ggml", reason), self.library.kernel(ggml_type)

    def _count_blocks(self, ggml_type: GGMLType, kernel: CountedKernel) -> Kernel:
        """Return the kernel as a plain function; its counts are added up here."""

        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> Bytes:
            data, counts = kernel(rows, weights)
            if counts.odd or counts.faulty:
                with self.lock:
                    self.odd[ggml_type.name] += counts.odd
                    if counts.faulty:
                        tensors = self.faulty.setdefault(ggml_type.name, Counter())
                        tensors[getattr(self.context, "tensor", "")] += counts.faulty
            return data

        return quantize
