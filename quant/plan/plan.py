"""Decide the type of every tensor of a variant. Pure: tensors and rules in, a plan out.

The first rule that matches a tensor decides. Tensors that llama-quantize never quantizes keep their
type.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quant.core.errors import raise_problems
from quant.llama.gguf import TensorSpec, pad
from quant.llama.tensors import sort_tensors, split_block
from quant.llama.types import TYPES, GGMLType
from quant.plan.recipe import Rule, Variant

# From tensor_allows_quantization (llama.cpp, src/llama-quant.cpp), name by name; a test marked
# `tools` asks llama-quantize itself. One-dimensional tensors and names that do not end in "weight"
# are left out by is_quantizable.
NOT_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^(position_embd|token_types)\.weight$|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd"
    r"|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""Matrices that llama-quantize leaves as they are."""


@dataclass(frozen=True)
class CoveragePolicy:
    """Tensors with insufficient imatrix coverage, and the policy for them."""

    tensors: Mapping[str, str]
    """Reason by tensor name."""
    otherwise: Literal["raise", "refuse", "report"]
    """``raise`` stores them as ``floor`` at least, ``refuse`` is an error, ``report`` accepts."""
    floor: str
    """Smallest ggml type that is good enough without imatrix data."""

    def applies_to(self, tensor: TensorSpec, ggml_type: GGMLType) -> bool:
        """Return whether ``ggml_type`` has fewer bits than the tensor needs without coverage."""
        return (
            tensor.name in self.tensors
            and ggml_type.bits_per_weight < self.find_floor(tensor).bits_per_weight
        )

    def find_floor(self, tensor: TensorSpec) -> GGMLType:
        """Return the floor, or the next larger plain type whose blocks fill the tensor's rows."""
        floor = TYPES[self.floor]
        # Types with blocks of 32 weights, then BF16 without blocks. None needs an imatrix.
        plain = (TYPES[name] for name in ("Q4_1", "Q5_1", "Q8_0", "BF16"))
        return next(
            t
            for t in (floor, *plain)
            if t.fits(tensor.shape[0]) and t.bits_per_weight >= floor.bits_per_weight
        )


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor and the type that it gets."""

    tensor: TensorSpec
    """The tensor in the BF16 file."""
    type: GGMLType
    rule: int | None
    """Index of the rule that decided; None for a tensor that keeps its type."""
    raised_from: GGMLType | None = None
    """The rule's type, where the coverage policy raised it."""

    @property
    def bytes(self) -> int:
        """Bytes of its data, without padding."""
        return self.type.bytes(self.tensor.elements)


@dataclass(frozen=True)
class Plan:
    """A variant of one model, tensor by tensor."""

    variant: Variant
    tensors: tuple[PlannedTensor, ...]
    """In file order."""

    @property
    def bytes(self) -> int:
        """Bytes of the data section, padding included."""
        return sum(pad(t.bytes) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights of the model, without padding and head."""
        return 8 * sum(t.bytes for t in self.tensors) / sum(t.tensor.elements for t in self.tensors)

    @property
    def is_base(self) -> bool:
        """Whether the plan is the converted file itself."""
        return self.variant.is_base

    def types(self) -> dict[str, str]:
        """Return the type's name by tensor name, in file order."""
        return {t.tensor.name: t.type.name for t in self.tensors}

    def type_bytes(self) -> dict[str, int]:
        """Return the bytes by type, the largest first."""
        total: Counter[str] = Counter()
        for t in self.tensors:
            total[t.type.name] += t.bytes
        return dict(total.most_common())

    def json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values; keys as ``quant plan --json`` prints them."""
        return {
            "name": self.variant.name,
            "bytes": self.bytes,
            "bpw": round(self.bits_per_weight, 4),
            "tensors": [
                {
                    "name": t.tensor.name,
                    "type": t.type.name,
                    "shape": list(t.tensor.shape),
                    "bytes": t.bytes,
                }
                for t in self.tensors
            ],
        }


def make_plan(
    variant: Variant,
    tensors: Collection[TensorSpec],
    covered: Collection[str] | None = None,
    policy: CoveragePolicy | None = None,
) -> Plan:
    """Return the type of every tensor of a model in one variant.

    Args:
        variant: The rules.
        tensors: All tensors of the BF16 file, in any order.
        covered: Names of the tensors with imatrix data; None means those that can have some.
        policy: Tensors with insufficient imatrix coverage, and what to do about them.

    Raises:
        InputError: The variant cannot be built for this model; every problem is listed.

    Example:
        >>> from quant.llama.types import TYPES
        >>> rules = (Rule(tensors=".*", type="Q8_0", why="Nearly lossless."),)
        >>> variant = Variant(name="Q8_0", summary="", file_type="Q8_0", rules=rules)
        >>> make_plan(variant, [TensorSpec("output.weight", (64, 2), TYPES["BF16"])]).types()
        {'output.weight': 'Q8_0'}
    """
    raise_problems(find_plan_problems(variant, tensors, covered, policy))
    if not variant.rules:
        return Plan(variant, tuple(PlannedTensor(t, t.type, None) for t in tensors))
    deciding = match_rules(variant, tensors)
    planned = (
        _plan_tensor(variant, t, deciding.get(t.name), policy) for t in sort_tensors(tensors)
    )
    return Plan(variant, tuple(planned))


def find_plan_problems(
    variant: Variant,
    tensors: Collection[TensorSpec],
    covered: Collection[str] | None,
    policy: CoveragePolicy | None = None,
) -> Iterator[str]:
    """Yield every reason why the variant cannot be built for these tensors; see ``make_plan``."""
    where = f"variant {variant.name}"
    if not variant.rules:
        return
    covered = find_coverable(tensors) if covered is None else covered
    deciding = match_rules(variant, tensors)
    used, kind = set(deciding.values()), "moe" if is_moe(tensors) else "dense"
    for n, rule in enumerate(variant.rules):
        if n not in used and not rule.optional and rule.only in (None, kind):
            yield (
                f"{where}: rules[{n}] ({rule.tensors!r}) matches no tensor of this model;"
                " correct it or set `optional = true`"
            )
    for t in tensors:
        decided = deciding.get(t.name)
        if decided is not None:
            rule, where_rule = variant.rules[decided], f"{where}: rules[{decided}]"
            yield from _find_type_problems(where_rule, t, rule, covered, policy)
        elif is_quantizable(t):
            yield f"{where}: tensor {t.name}: expected a rule that matches it, found none"


def is_quantizable(tensor: TensorSpec) -> bool:
    """Return whether llama-quantize would change the tensor's type."""
    # ggml_n_dims ignores trailing dimensions of 1.
    matrix = any(n > 1 for n in tensor.shape[1:])
    return matrix and tensor.name.endswith("weight") and not NOT_QUANTIZED.search(tensor.name)


def is_moe(tensors: Collection[TensorSpec]) -> bool:
    """Return whether the model is a mixture of experts."""
    return any("_exps." in t.name for t in tensors)


def compute_depths(tensors: Collection[TensorSpec]) -> dict[str, float]:
    """Return the relative depth of every block tensor by name: block number / trunk blocks.

    0 is the first block; the last trunk block is below 1. Blocks with ``nextn`` tensors predict
    further tokens (MTP). They lie behind the trunk, at 1 and more.
    """
    blocks = {t.name: n for t in tensors if (n := split_block(t.name)[0]) is not None}
    mtp = {blocks[name] for name in blocks if ".nextn." in name}
    # At least 1: the converter's --mtp writes a file of MTP blocks alone.
    trunk = max(len(set(blocks.values()) - mtp), 1)
    return {name: n / trunk for name, n in blocks.items()}


def find_coverable(tensors: Collection[TensorSpec]) -> set[str]:
    """Return the names of the tensors that an imatrix can have data for: those of the trunk.

    llama-imatrix records matrix products. The embedding is looked up row by row, output.weight is
    only recorded with --process-output, and MTP blocks do not run in an ordinary forward pass.
    """
    return {name for name, depth in compute_depths(tensors).items() if depth < 1}


def match_rules(variant: Variant, tensors: Collection[TensorSpec]) -> dict[str, int | None]:
    """Return the index of the first matching rule by tensor name; None where no rule matches.

    Tensors that are not quantized are left out.
    """
    depths, moe = compute_depths(tensors), is_moe(tensors)

    def find_rule(name: str) -> int | None:
        depth = depths.get(name)
        matching = (n for n, r in enumerate(variant.rules) if r.matches(name, depth, moe))
        return next(matching, None)

    return {t.name: find_rule(t.name) for t in tensors if is_quantizable(t)}


def choose_type(rule: Rule, tensor: TensorSpec) -> GGMLType:
    """Return the rule's type, or its fallback type where rows do not fill the type's blocks."""
    ggml_type = TYPES[rule.type]
    if ggml_type.fits(tensor.shape[0]) or rule.narrow is None:
        return ggml_type
    return TYPES[rule.narrow]


def _plan_tensor(
    variant: Variant, tensor: TensorSpec, rule: int | None, policy: CoveragePolicy | None
) -> PlannedTensor:
    if rule is None:
        return PlannedTensor(tensor, tensor.type, None)
    ggml_type = choose_type(variant.rules[rule], tensor)
    if policy and policy.otherwise == "raise" and policy.applies_to(tensor, ggml_type):
        return PlannedTensor(tensor, policy.find_floor(tensor), rule, raised_from=ggml_type)
    return PlannedTensor(tensor, ggml_type, rule)


def _find_type_problems(
    where: str,
    tensor: TensorSpec,
    rule: Rule,
    covered: Collection[str],
    policy: CoveragePolicy | None,
) -> Iterator[str]:
    ggml_type = choose_type(rule, tensor)
    where = f"{where}: tensor {tensor.name}"
    if not ggml_type.fits(tensor.shape[0]):
        yield (
            f"{where}: expected a row that is a multiple of {ggml_type.block} for"
            f" {ggml_type.name}, found {tensor.shape[0]}; give the rule a `narrow` type"
        )
    action = policy.otherwise if policy and policy.applies_to(tensor, ggml_type) else "report"
    if policy and action == "refuse":
        yield (
            f"{where}: {ggml_type.name} has insufficient imatrix coverage:"
            f" {policy.tensors[tensor.name]}; give it {policy.floor} or more,"
            " or use more calibration text"
        )
    elif ggml_type.needs_imatrix and tensor.name not in covered and action != "raise":
        # With `raise` the tensor gets the floor instead, which needs no imatrix.
        yield (
            f"{where}: {ggml_type.name} needs imatrix data, found none for this tensor;"
            " give it a type that needs none"
        )
