"""What is known of a model before anything of it was measured: typical errors of types, and class figures of GLM-4.x.

Both are marked as such wherever they are used. Measured sensitivities of the very model are better in every case.
"""

from collections.abc import Iterable, Mapping, Sequence

from quant.llama.gguf import TensorSpec
from quant.llama.tensors import tensor_class
from quant.plan.error_table import CANDIDATES, ErrorTable, TensorError, list_possible_types
from quant.plan.plan import compute_depths, find_coverable, is_quantizable
from quant.plan.sensitivity import Sensitivities

NOTHING = "prior"
"""Stands for the digest of weights that nobody has."""
CREDIT = (
    "Class sensitivities of GLM-4.6 derived from per-tensor KLD data by Thireus, GGUF Tool Suite "
    "(github.com/Thireus/GGUF-Tool-Suite)"
)
"""Asked for by the licence of the data."""

SHARES = {
    "IQ1_S": 0.231,
    "IQ1_M": 0.198,
    "IQ2_XXS": 0.115,
    "IQ2_XS": 0.0875,
    "Q2_K": 0.0698,
    "IQ2_S": 0.0605,
    "IQ3_XXS": 0.0319,
    "Q3_K": 0.0205,
    "IQ3_S": 0.0182,
    "IQ4_XS": 0.00563,
    "IQ4_NL": 0.00553,
    "Q4_K": 0.00489,
    "Q4_0": 0.0078,
    "Q4_1": 0.0060,
    "Q5_0": 0.00195,
    "Q5_1": 0.00150,
    "Q5_K": 0.00123,
    "Q6_K": 0.000293,
    "Q8_0": 0.0000283,
}
"""Share of the weighted squares that a type loses of rows without outliers: measured on tiny-glm, where nearly all matrices
agree to a few hundredths. Those of the four oldest types are from their bits."""
MEASURED_AT = "IQ1_M"
"""The public figures are for a type of the same 1.75 bits."""

GLM_PER_GIGA = {
    "attn_k": 0.076,
    "attn_v": 0.076,
    "output": 0.084,
    "ffn_gate_shexp": 0.030,
    "ffn_up_shexp": 0.030,
    "ffn_down_shexp": 0.030,
    "attn_output": 0.0225,
    "attn_q": 0.0079,
    "ffn_gate": 0.008,
    "ffn_up": 0.008,
    "ffn_down": 0.010,
    "token_embd": 0.0048,
    "ffn_gate_exps": 0.0008,
    "ffn_up_exps": 0.0008,
    "ffn_down_exps": 0.0009,
}
"""Divergence for 10^9 weights at 1.75 bits."""
PEAKS = {"attn_output": (0.31, 0.49, 3.0, 0.55), "ffn_down_exps": (0.45, 0.66, 1.5, 0.87)}
"""Classes that matter more in a part of the trunk: from, to, times as much there, and elsewhere."""
UNUSED = 1e-3
"""How much an MTP block counts, against what its tensors would in the trunk: it only guesses ahead."""


def make_typical_errors(
    tensors: Sequence[TensorSpec], types: Iterable[str] = CANDIDATES
) -> ErrorTable:
    """Errors as most matrices have them; types that need importance only where there can be data."""
    covered, wanted = find_coverable(tensors), [n for n in types if n in SHARES]
    errors = {
        t.name: {
            n: TensorError(SHARES[n], 0.0)
            for n in list_possible_types(t, wanted, covered=t.name in covered)
        }
        for t in tensors
        if is_quantizable(t)
    }
    return ErrorTable(NOTHING, None, errors, dict.fromkeys(errors, 1.0))


def make_prior_sensitivities(tensors: Sequence[TensorSpec]) -> Sensitivities:
    """By class and size, after the figures of GLM-4.6."""
    at, specs = compute_depths(tensors), {t.name: t for t in tensors if is_quantizable(t)}
    scales = {name: _damage(t, at.get(name)) / SHARES[MEASURED_AT] for name, t in specs.items()}
    return Sensitivities(
        NOTHING, "priors by class, not measured on this model", scales, credit=CREDIT
    )


def _damage(tensor: TensorSpec, depth: float | None) -> float:
    kind = tensor_class(tensor.name)
    per_giga = GLM_PER_GIGA.get(kind, _fallback(GLM_PER_GIGA))
    if depth is not None and depth >= 1:
        per_giga *= UNUSED
    elif kind in PEAKS and depth is not None:
        begin, end, inside, outside = PEAKS[kind]
        per_giga *= inside if begin <= depth < end else outside
    return per_giga * tensor.elements / 1e9


def _fallback(known: Mapping[str, float]) -> float:
    """For a class that nobody measured: as much as attention's queries."""
    return known["attn_q"]
