"""Typical errors and sensitivities, for a model of which nothing was measured.

Errors of types are typical values; sensitivities are class figures of GLM-4.6. Everything that uses
them says so. Measured sensitivities of the model itself are better in every case.
"""

from collections.abc import Iterable, Sequence

from quant.llama.gguf import TensorSpec
from quant.llama.tensors import tensor_class
from quant.plan.error_table import CANDIDATES, ErrorTable, TensorError, list_possible_types
from quant.plan.plan import compute_depths, find_coverable, is_quantizable
from quant.plan.sensitivity import Sensitivities

NO_BASE = "prior"
"""Stands for the sha256 of a BF16 file that nobody has."""
CREDIT = (
    "Class sensitivities of GLM-4.6 derived from per-tensor KLD data by Thireus, GGUF Tool Suite "
    "(github.com/Thireus/GGUF-Tool-Suite)"
)
"""Attribution that the license of the data asks for."""

RELATIVE_MSE = {
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
"""Relative weighted MSE of each type on rows without outliers.

Measured on tiny-glm, where nearly all matrices agree to a few percent. Those of the four oldest
types (Q4_0 to Q5_1) follow from their bits.
"""
REFERENCE_TYPE = "IQ1_M"
"""The public figures are for a type of the same 1.75 bits per weight."""

GLM_KLD_PER_GIGA = {
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
"""KLD in nats for 10^9 weights of a class at 1.75 bits per weight."""
UNKNOWN_CLASS = "attn_q"
"""A class that nobody measured counts like this one."""
# Averaged over the depth, both factors of a class are about 1, so its sum stays the public one.
PEAKS = {"attn_output": (0.31, 0.49, 3.0, 0.55), "ffn_down_exps": (0.45, 0.66, 1.5, 0.87)}
"""Classes that matter more at some depth: from, to, factor there, factor elsewhere."""
MTP_FACTOR = 1e-3
"""Weight of an MTP block against a trunk block: it only drafts tokens."""


def make_typical_errors(
    tensors: Sequence[TensorSpec], types: Iterable[str] = CANDIDATES
) -> ErrorTable:
    """Return an error table of typical values.

    Types that need an imatrix are left out where none can have data.

    Args:
        tensors: All tensors of the model.
        types: Types to choose from; those without a typical value are left out.
    """
    coverable, known = find_coverable(tensors), [n for n in types if n in RELATIVE_MSE]
    errors = {
        t.name: {
            n: TensorError(RELATIVE_MSE[n], 0.0)
            for n in list_possible_types(t, known, covered=t.name in coverable)
        }
        for t in tensors
        if is_quantizable(t)
    }
    # Σ h w² needs weights. Predictions use relative errors only.
    return ErrorTable(base=NO_BASE, imatrix=None, errors=errors, squares=dict.fromkeys(errors, 1.0))


def make_prior_sensitivities(tensors: Sequence[TensorSpec]) -> Sensitivities:
    """Return sensitivities by class and size, from the figures of GLM-4.6."""
    depths = compute_depths(tensors)
    scales = {
        # KLD = s · e with power 1: figures of classes do not show how errors amplify each other.
        t.name: _estimate_kld(t, depths.get(t.name)) / RELATIVE_MSE[REFERENCE_TYPE]
        for t in tensors
        if is_quantizable(t)
    }
    source = "priors by class, not measured on this model"
    return Sensitivities(base=NO_BASE, source=source, scales=scales, credit=CREDIT)


def _estimate_kld(tensor: TensorSpec, depth: float | None) -> float:
    """Return the KLD in nats that the tensor causes at 1.75 bits per weight."""
    name = tensor_class(tensor.name)
    per_giga = GLM_KLD_PER_GIGA.get(name, GLM_KLD_PER_GIGA[UNKNOWN_CLASS])
    if depth is not None and depth >= 1:
        per_giga *= MTP_FACTOR
    elif name in PEAKS and depth is not None:
        begin, end, inside, outside = PEAKS[name]
        per_giga *= inside if begin <= depth < end else outside
    return per_giga * tensor.elements / 1e9
