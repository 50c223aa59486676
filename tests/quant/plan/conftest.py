"""Models whose types are allocated without measuring: tensors and priors."""

from quant.plan import priors
from quant.plan.allocate import AllocationInputs
from quant.plan.inventory import read_architecture
from quant.plan.load import load_model
from quant.plan.plan import find_coverable


def make_inputs(model: str) -> AllocationInputs:
    """Return what is known of a model before anything is measured."""
    recipe, _ = load_model(model)
    architecture = read_architecture(recipe.architecture)
    tensors = architecture.tensors()
    return AllocationInputs(
        tensors=tensors,
        covered=frozenset(find_coverable(tensors)),
        errors=priors.make_typical_errors(tensors),
        sensitivities=priors.make_prior_sensitivities(tensors),
        head_bytes=recipe.header_bytes,
        kv_bytes=architecture.kv_bytes_per_token(),
    )
