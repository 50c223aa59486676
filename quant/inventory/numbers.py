"""What every architecture has in common: reading its numbers from a configuration, and writing down a tensor."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from quant.errors import InputError
from quant.ggml_types import TYPES
from quant.header import TensorSpec

T = TypeVar("T", bound="Numbers")


@dataclass(frozen=True)
class Numbers:
    """The numbers of config.json from which an architecture's tensors follow; fields are called as the keys are."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the BF16 file."""
        raise NotImplementedError

    def kv_bytes_per_token(self) -> int:
        """Bytes that the KV cache takes for one token of context, in F16."""
        return 0

    @classmethod
    def names(cls) -> list[str]:
        """The keys that are asked for."""
        return [f.name for f in fields(cls)]


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
        expected = bool if f.type is bool else int
        if type(value) is not expected or value < 0:
            wanted = "true or false" if expected is bool else "a whole number"
            problems.append(f"{where}: {f.name}: expected {wanted}, found {value!r}")
            continue
        found[f.name] = value
    if problems:
        raise InputError(*problems)
    return kind(**found)


def f32(name: str, *shape: int) -> TensorSpec:
    """A tensor that stays in F32: norms, biases and routers. Row length first."""
    return TensorSpec(name, shape, TYPES["F32"])


def matrix(name: str, *shape: int) -> TensorSpec:
    """A tensor that has the file's type. Row length first."""
    return TensorSpec(name, shape, TYPES["BF16"])
