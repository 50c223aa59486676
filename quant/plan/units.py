"""What an allocation may choose: units of tensors, their types, and the constraints. Pure."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from re import fullmatch

from quant.core.errors import raise_problems
from quant.llama.gguf import TensorSpec, pad
from quant.llama.tensors import tensor_class
from quant.llama.types import TYPES


@dataclass(frozen=True)
class Option:
    """One type for a unit."""

    type: str
    bytes: int
    """Bytes in the file, padding included."""
    kld: float
    """Predicted KLD that the type adds, in nats."""


@dataclass(frozen=True)
class Unit:
    """Tensors that get one type together: one tensor, or gate and up projection of a layer."""

    names: tuple[str, ...]
    tensor_class: str
    """The class, in which the number of types may be limited."""
    options: tuple[Option, ...]
    keep_dominated: bool = False
    """Whether dominated options may be chosen, when the number of types of a class is limited."""

    @cached_property
    def undominated(self) -> tuple[Option, ...]:
        """The options to choose from, smallest first.

        An option is dominated if another one is not larger and has no more KLD.
        """
        by_size = sorted(self.options, key=lambda o: (o.bytes, o.kld))
        if self.keep_dominated:
            return tuple(by_size)
        best: list[Option] = []
        for option in by_size:
            # Pareto front in one pass: in order of size, an option has to have less KLD than all
            # before it.
            if not best or option.kld < best[-1].kld:
                best.append(option)
        return tuple(best)

    @property
    def min_bytes(self) -> int:
        """Bytes of the smallest option."""
        return self.undominated[0].bytes

    @property
    def max_bytes(self) -> int:
        """Bytes of the best option."""
        return self.undominated[-1].bytes


@dataclass(frozen=True)
class Budget:
    """Bytes that the tensors whose whole name matches may take together."""

    name: str
    """Description for errors."""
    bytes: int
    tensors: str = ".*"
    """Regular expression for whole tensor names."""

    def counts(self, unit: Unit) -> bool:
        """Return whether the unit's bytes count against this budget."""
        # One name stands for all: budgets tell experts from the rest, never gate from up.
        return fullmatch(self.tensors, unit.names[0]) is not None


@dataclass(frozen=True)
class Constraints:
    """Constraints of an allocation beside its size; each can be switched off."""

    gate_up_alike: bool = True
    """Gate and up projection of a layer share a type; fused kernels need it."""
    most_types: int | None = None
    """Maximum number of types in one class of tensors; None is unlimited."""
    mtp_pinned: bool = True
    """MTP blocks get fixed types: an evaluation does not run them, so no KLD shows their error."""
    pinned: Mapping[str, str] = field(default_factory=dict)
    """Type by regular expression for whole tensor names; the first match counts."""
    excluded: frozenset[str] = frozenset()
    """Types that are not used."""
    ceiling: Mapping[str, str] = field(default_factory=dict)
    """Largest type by tensor: its type in the next larger file of a monotone ladder."""

    def find_pin(self, name: str) -> str | None:
        """Return the type that a tensor is pinned to; None if it is not pinned."""
        return next((t for pattern, t in self.pinned.items() if fullmatch(pattern, name)), None)

    def allows(self, kind: str, name: str) -> bool:
        """Return whether a tensor may get a type."""
        # A pin allows its type whatever the ceiling is, so that no tensor is left without a type.
        if pin := self.find_pin(name):
            return kind == pin
        ceiling = self.ceiling.get(name)
        fits = ceiling is None or TYPES[kind].bits_per_weight <= TYPES[ceiling].bits_per_weight
        return fits and kind not in self.excluded


_LOOKUP_TYPES = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
SLOW_TYPES = {
    "apple": _LOOKUP_TYPES,
    "arm": _LOOKUP_TYPES | {"IQ4_XS"},
    # IQ1_M is no case of ggml_cuda_should_use_mmq (ggml-cuda/mmq.cu), so cuBLAS multiplies it.
    "cuda": frozenset({"IQ1_M"}),
}
"""Types that are slow on a kind of machine.

On CPUs and Apple GPUs they are those with large lookup tables. On CUDA it is the one without a
kernel for matrix products with many tokens (MMQ).
"""


def build_units(
    tensors: Sequence[TensorSpec],
    klds: Mapping[str, Mapping[str, float]],
    constraints: Constraints,
) -> tuple[Unit, ...]:
    """Return the units of a model with the options that the constraints leave.

    Args:
        tensors: All tensors of the model.
        klds: Predicted KLD by tensor and type, for the tensors to choose types for.
        constraints: What is allowed.

    Raises:
        InputError: Tensors are left without a type; every one is listed.
    """
    specs = {t.name: t for t in tensors}
    units, problems = [], []
    for names in _group_names(klds, constraints):
        options = [
            Option(
                type=kind,
                bytes=sum(pad(TYPES[kind].bytes(specs[n].elements)) for n in names),
                kld=sum(klds[n][kind] for n in names),
            )
            for kind in klds[names[0]]
            if all(kind in klds[n] and constraints.allows(kind, n) for n in names)
        ]
        if options:
            units.append(Unit(names, tensor_class(names[0]), tuple(options)))
        else:
            problems.append(_explain_no_type(names[0], klds[names[0]], constraints))
    raise_problems(problems)
    return tuple(units)


def _group_names(names: Collection[str], constraints: Constraints) -> Iterator[tuple[str, ...]]:
    """Yield the names of each unit; gate and up projection of a layer are one."""
    for name in names:
        gate, up = name.replace("ffn_up", "ffn_gate"), name.replace("ffn_gate", "ffn_up")
        # Equal names have neither part. ffn_gate_inp, the router, has no counterpart.
        if not constraints.gate_up_alike or gate not in names or up not in names or gate == up:
            yield (name,)
        elif name == gate:
            yield (gate, up)


def _explain_no_type(name: str, possible: Collection[str], constraints: Constraints) -> str:
    listed = ", ".join(possible)
    if pin := constraints.find_pin(name):
        return f"tensor {name}: pinned to {pin}, which it cannot have; possible are {listed}"
    return (
        f"tensor {name}: no type is left of {listed}: exclude fewer, or leave out the ladder's"
        " ceiling"
    )
