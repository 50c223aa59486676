"""What every architecture has in common: reading its numbers from a configuration, and writing down a tensor."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from quant.errors import raise_problems
from quant.llama.gguf import TensorSpec
from quant.llama.types import TYPES

T = TypeVar("T", bound="ArchitectureConfig")


@dataclass(frozen=True)
class ArchitectureConfig(ABC):
    """The numbers of config.json from which an architecture's tensors follow; fields are called as the keys are."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the file."""
        return tuple(self.walk())

    @abstractmethod
    def walk(self) -> Iterator[TensorSpec]:
        """Every tensor, in no order that counts."""

    def kv_bytes_per_token(self) -> int:
        """Bytes that the KV cache takes for one token of context, in F16."""
        return 0

    def problems(self) -> Iterator[str]:
        """Why these numbers do not go together."""
        yield from ()

    @classmethod
    def names(cls) -> list[str]:
        """The keys that are asked for."""
        return [f.name for f in fields(cls)]


MAY_BE_NONE = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "head_dim"}
"""Numbers that may be 0; every other one divides or multiplies something."""
MOST = {
    "num_hidden_layers": 512,
    "depth": 512,
    "num_nextn_predict_layers": 512,
    "n_routed_experts": 1024,
}
"""As many as llama.cpp takes (src/llama-hparams.h), so that a slip of the pen does not become a list without end."""
LARGEST = 2**31 - 1


def read_numbers(kind: type[T], config: Mapping[str, Any], where: str) -> T:
    """The numbers of a configuration; other keys are passed over.

    Raises InputError with every key that is missing or is not what it must be.
    """
    problems, found = [], {}
    for f in fields(kind):
        value = config.get(f.name)
        if value is None:
            if f.default is MISSING:
                problems.append(f"{where}: {f.name}: missing; {kind.__name__} needs it")
            continue
        if wanted := _unlike(f.name, f.type, value):
            problems.append(f"{where}: {f.name}: expected {wanted}, found {value!r}")
            continue
        found[f.name] = tuple(value) if isinstance(value, list) else value
    raise_problems(problems)
    made = kind(**found)
    raise_problems(f"{where}: {problem}" for problem in made.problems())
    return made


def _unlike(name: str, kind: Any, value: Any) -> str | None:
    """What a value had to be, if it is not that."""
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is int:
        least, most = int(name not in MAY_BE_NONE), MOST.get(name, LARGEST)
        fits = type(value) is int and least <= value <= most
        return None if fits else f"a whole number from {least} to {most}"
    return (
        None
        if isinstance(value, list) and all(isinstance(v, str) for v in value)
        else "a list of names"
    )


def f32(name: str, *shape: int) -> TensorSpec:
    """A tensor that stays in F32: norms, biases and routers. Row length first."""
    return TensorSpec(name, shape, TYPES["F32"])


def matrix(name: str, *shape: int) -> TensorSpec:
    """A tensor that has the file's type. Row length first."""
    return TensorSpec(name, shape, TYPES["BF16"])


def biased(name: str, rows: int, columns: int, bias: bool) -> Iterator[TensorSpec]:
    """A matrix, and its bias if it has one."""
    yield matrix(f"{name}.weight", rows, columns)
    if bias:
        yield f32(f"{name}.bias", columns)


def ends(hidden: int, vocabulary: int, tied: bool) -> Iterator[TensorSpec]:
    """The embedding, the last norm, and the output unless the embedding serves as one."""
    yield matrix("token_embd.weight", hidden, vocabulary)
    yield f32("output_norm.weight", hidden)
    if not tied:
        yield matrix("output.weight", hidden, vocabulary)
