"""Decide which type every tensor of every variant gets. Pure: specs and rules in, a plan out, nothing is opened.

The first rule that matches a tensor decides. Tensors that llama-quantize never touches keep what they are.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quant.errors import raise_problems
from quant.llama.gguf import TensorSpec, pad
from quant.llama.tensors import sort_tensors, split_block
from quant.llama.types import TYPES, GGMLType
from quant.plan.recipe import Rule, Variant

NOT_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^(position_embd|token_types)\.weight$|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""Matrices that stay as they are, beside everything that is one-dimensional or no ``weight``.

From llama.cpp's ``tensor_allows_quantization`` (src/llama-quant.cpp); a test asks llama-quantize itself.
"""


@dataclass(frozen=True)
class CoveragePolicy:
    """Tensors that the importance matrix knows too badly, and what is done about them."""

    tensors: Mapping[str, str]
    """Why each is in doubt."""
    otherwise: Literal["raise", "refuse", "report"]
    """Store them as ``floor`` at least, refuse to store them as less, or only tell."""
    floor: str
    """The type from which on importance is not needed to trust a tensor."""

    def concerns(self, tensor: TensorSpec, wanted: GGMLType) -> bool:
        """Whether that type would be below what the tensor can be trusted with."""
        return (
            tensor.name in self.tensors
            and wanted.bits_per_weight < self.trusted(tensor).bits_per_weight
        )

    def trusted(self, tensor: TensorSpec) -> GGMLType:
        """The floor, or the next plain type whose blocks fill the tensor's rows."""
        floor = TYPES[self.floor]
        plain = (TYPES[name] for name in ("Q4_1", "Q5_1", "Q8_0", "BF16"))
        return next(
            t
            for t in (floor, *plain)
            if t.fits(tensor.shape[0]) and t.bits_per_weight >= floor.bits_per_weight
        )


@dataclass(frozen=True)
class PlannedTensor:
    """What one tensor will be."""

    tensor: TensorSpec
    """As it is in the BF16 file."""
    type: GGMLType
    rule: int | None
    """Index of the rule that decided; none for a tensor that keeps its type."""
    raised_from: GGMLType | None = None
    """What the rule says, where the tensor is stored as more because the importance matrix knows it too badly."""

    @property
    def bytes(self) -> int:
        """Size of its data, without padding."""
        return self.type.bytes(self.tensor.elements)


@dataclass(frozen=True)
class Plan:
    """A variant of one model, tensor by tensor."""

    variant: Variant
    tensors: tuple[PlannedTensor, ...]
    """In the order of the file."""

    @property
    def bytes(self) -> int:
        """Size of the data section, padding included."""
        return sum(pad(t.bytes) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights of the model."""
        return 8 * sum(t.bytes for t in self.tensors) / sum(t.tensor.elements for t in self.tensors)

    @property
    def is_base(self) -> bool:
        """Whether it is the converted file itself."""
        return self.variant.is_base

    def types(self) -> dict[str, str]:
        """Type by tensor, in the order of the file."""
        return {t.tensor.name: t.type.name for t in self.tensors}

    def type_bytes(self) -> dict[str, int]:
        """Bytes by type, the largest first."""
        total: Counter[str] = Counter()
        for t in self.tensors:
            total[t.type.name] += t.bytes
        return dict(total.most_common())

    def json(self) -> dict[str, Any]:
        """The plan as plain JSON."""
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
    doubt: CoveragePolicy | None = None,
) -> Plan:
    """The types of one variant for a model's tensors.

    ``covered`` are the tensors that the imatrix has data for; before there is one, those that it can have data for.
    ``doubt`` says which of them it knows too badly, and what becomes of those.

    Raises InputError with everything that keeps the variant from being built for this model.
    """
    raise_problems(find_plan_problems(variant, tensors, covered, doubt))
    if not variant.rules:
        return Plan(variant, tuple(PlannedTensor(t, t.type, None) for t in tensors))
    deciding = match_rules(variant, tensors)
    return Plan(
        variant,
        tuple(_planned(variant, t, deciding.get(t.name), doubt) for t in sort_tensors(tensors)),
    )


def find_plan_problems(
    variant: Variant,
    tensors: Collection[TensorSpec],
    covered: Collection[str] | None,
    doubt: CoveragePolicy | None = None,
) -> Iterator[str]:
    """Every reason why the variant cannot be built for these tensors; nothing means that it can."""
    where = f"variant {variant.name}"
    if not variant.rules:
        return
    covered = find_coverable(tensors) if covered is None else covered
    deciding = match_rules(variant, tensors)
    used, moe = set(deciding.values()), is_moe(tensors)
    for n, rule in enumerate(variant.rules):
        if n not in used and not rule.optional and rule.only in (None, "moe" if moe else "dense"):
            yield f"{where}: rules[{n}] ({rule.tensors!r}) decides no tensor of this model; mend it or say `optional = true`"
    for t in tensors:
        decided = deciding.get(t.name)
        if decided is not None:
            yield from _type_problems(
                f"{where}: rules[{decided}]", t, variant.rules[decided], covered, doubt
            )
        elif is_quantizable(t):
            yield f"{where}: tensor {t.name}: expected a rule that matches it, found none"


def is_quantizable(tensor: TensorSpec) -> bool:
    """Whether llama-quantize would change a tensor's type."""
    matrix = any(n > 1 for n in tensor.shape[1:])
    return matrix and tensor.name.endswith("weight") and not NOT_QUANTIZED.search(tensor.name)


def is_moe(tensors: Collection[TensorSpec]) -> bool:
    """Whether the model has experts."""
    return any("_exps." in t.name for t in tensors)


def compute_depths(tensors: Collection[TensorSpec]) -> dict[str, float]:
    """Where in the trunk each tensor's block lies: 0 for the first block, below 1 for the last, 1 and more behind it.

    Blocks with ``nextn`` tensors predict further tokens (MTP); they are no part of the trunk.
    """
    blocks = {t.name: n for t in tensors if (n := split_block(t.name)[0]) is not None}
    ahead = {blocks[name] for name in blocks if ".nextn." in name}
    trunk = max(len(set(blocks.values()) - ahead), 1)
    return {name: n / trunk for name, n in blocks.items()}


def find_coverable(tensors: Collection[TensorSpec]) -> set[str]:
    """The tensors that an imatrix can have data for: those of the trunk's blocks."""
    return {name for name, depth in compute_depths(tensors).items() if depth < 1}


def match_rules(variant: Variant, tensors: Collection[TensorSpec]) -> dict[str, int | None]:
    """For every tensor that can be quantised, the index of the first rule that speaks of it, or none."""
    at, moe = compute_depths(tensors), is_moe(tensors)
    return {
        t.name: next(
            (
                n
                for n, rule in enumerate(variant.rules)
                if rule.matches(t.name, at.get(t.name), moe)
            ),
            None,
        )
        for t in tensors
        if is_quantizable(t)
    }


def choose_type(rule: Rule, tensor: TensorSpec) -> GGMLType:
    """What a rule makes of a tensor: its type, or its type for narrow rows."""
    wanted = TYPES[rule.type]
    return wanted if wanted.fits(tensor.shape[0]) or rule.narrow is None else TYPES[rule.narrow]


def _planned(
    variant: Variant, tensor: TensorSpec, rule: int | None, doubt: CoveragePolicy | None
) -> PlannedTensor:
    if rule is None:
        return PlannedTensor(tensor, tensor.type, None)
    wanted = choose_type(variant.rules[rule], tensor)
    if doubt and doubt.otherwise == "raise" and doubt.concerns(tensor, wanted):
        return PlannedTensor(tensor, doubt.trusted(tensor), rule, raised_from=wanted)
    return PlannedTensor(tensor, wanted, rule)


def _type_problems(
    where: str,
    tensor: TensorSpec,
    rule: Rule,
    covered: Collection[str],
    doubt: CoveragePolicy | None,
) -> Iterator[str]:
    ggml_type = choose_type(rule, tensor)
    if not ggml_type.fits(tensor.shape[0]):
        yield (
            f"{where}: tensor {tensor.name}: expected a row that is a multiple of {ggml_type.block} for {ggml_type.name},"
            f" found {tensor.shape[0]}; give the rule a `narrow` type"
        )
    otherwise = doubt.otherwise if doubt and doubt.concerns(tensor, ggml_type) else "report"
    if doubt and otherwise == "refuse":
        yield (
            f"{where}: tensor {tensor.name}: {ggml_type.name} cannot be vouched for: {doubt.tensors[tensor.name]};"
            f" give it {doubt.floor} or more, or draw more calibration"
        )
    elif ggml_type.needs_imatrix and tensor.name not in covered and otherwise != "raise":
        yield (
            f"{where}: tensor {tensor.name}: {ggml_type.name} needs imatrix data, found none for this tensor;"
            " give it a type that needs none"
        )
