"""Read an architecture's keys from config.json; helpers for single tensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from quant.core.errors import raise_problems
from quant.llama.gguf import TensorSpec
from quant.llama.tensors import OUTPUT, TOKEN_EMBEDDING
from quant.llama.types import TYPES
from quant.plan.sizes import KVCache

T = TypeVar("T", bound="ArchitectureConfig")


@dataclass(frozen=True)
class ArchitectureConfig(ABC):
    """The keys of config.json that decide an architecture's tensors; fields are named like keys."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return every tensor of the converted file, in no particular order."""
        return tuple(self.iter_tensors())

    @abstractmethod
    def iter_tensors(self) -> Iterator[TensorSpec]:
        """Yield every tensor of the converted file."""

    def kv_cache(self) -> KVCache:
        """Return the shape of the KV cache; all zeros for a part that has none."""
        return KVCache(layers=0, kv_heads=0, key_length=0, value_length=0)

    def kv_bytes_per_token(self) -> int:
        """Return the bytes of KV cache that one token of context takes, in F16."""
        return self.kv_cache().bytes_per_token

    def problems(self) -> Iterator[str]:
        """Yield the reasons why these values contradict each other."""
        yield from ()

    @classmethod
    def keys(cls) -> list[str]:
        """Return the keys of config.json that are read."""
        return [f.name for f in fields(cls)]


MAY_BE_ZERO = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "head_dim"}
"""Keys that may be 0; every other one divides or multiplies something."""
MAXIMA = {
    "num_hidden_layers": 512,
    "depth": 512,
    "num_nextn_predict_layers": 512,
    "n_routed_experts": 1024,
}
"""Largest values: llama.cpp's limits (src/llama-hparams.h). They also bound the tensor list."""
LARGEST = 2**31 - 1


def parse_config(kind: type[T], config: Mapping[str, Any], where: str) -> T:
    """Return an architecture's keys from a configuration; other keys are ignored.

    Args:
        kind: The architecture.
        config: config.json, or the part of it for text or vision.
        where: The name of the configuration in errors.

    Raises:
        InputError: Keys are missing, of the wrong type or out of range; every one is listed.
    """
    problems, values = [], {}
    for f in fields(kind):
        value = config.get(f.name)
        if value is None:
            if f.default is MISSING:
                problems.append(f"{where}: {f.name}: missing; {kind.__name__} needs it")
            continue
        if expected := _find_mismatch(f.name, f.type, value):
            problems.append(f"{where}: {f.name}: expected {expected}, found {value!r}")
            continue
        values[f.name] = tuple(value) if isinstance(value, list) else value
    raise_problems(problems)
    parsed = kind(**values)
    raise_problems(f"{where}: {problem}" for problem in parsed.problems())
    return parsed


def _find_mismatch(name: str, kind: Any, value: Any) -> str | None:
    """Return what was expected instead of ``value``; None if it is valid."""
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is int:
        least, most = int(name not in MAY_BE_ZERO), MAXIMA.get(name, LARGEST)
        # type(), because True is an int.
        valid = type(value) is int and least <= value <= most
        return None if valid else f"a whole number from {least} to {most}"
    names = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return None if names else "a list of names"


def f32(name: str, *shape: int) -> TensorSpec:
    """Return a tensor that the converter keeps in F32: norms, biases, routers. Row length first."""
    # conversion/base.py, prepare_tensors: one dimension, _norm.weight, no .weight, or in its list.
    return TensorSpec(name, shape, TYPES["F32"])


def matrix(name: str, *shape: int) -> TensorSpec:
    """Return a tensor in the file's type, BF16. Row length first."""
    return TensorSpec(name, shape, TYPES["BF16"])


def linear(name: str, inputs: int, outputs: int, *, bias: bool) -> Iterator[TensorSpec]:
    """Yield a weight matrix, and its bias if it has one."""
    yield matrix(f"{name}.weight", inputs, outputs)
    if bias:
        yield f32(f"{name}.bias", outputs)


def embedding_and_output(hidden: int, vocabulary: int, *, tied: bool) -> Iterator[TensorSpec]:
    """Yield the embedding, the last norm, and the output matrix unless it is tied."""
    yield matrix(TOKEN_EMBEDDING, hidden, vocabulary)
    yield f32("output_norm.weight", hidden)
    if not tied:
        yield matrix(OUTPUT, hidden, vocabulary)
