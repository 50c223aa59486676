"""GGUF Foundry: from a checkpoint on the hub to a tested GGUF release.

This is the public API. Names are imported when they are first used, so ``import quant`` takes
milliseconds. Everything else in the packages may change between versions. ``docs/python.md`` shows
the functions in use. Most names say verb and object, because ``quant.plan``, ``quant.build``,
``quant.quantize`` and ``quant.evaluate`` are the packages and modules in which they live.

Example:
    >>> import quant
    >>> release = quant.plan_model("glm-4.6", ["UD-Q2_K_XL"])
    >>> release.plans[0].types()["output.weight"]
    'Q6_K'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.build import BuildResult as BuildResult
    from quant.build import build_release as build_release
    from quant.chat.standalone import SmokeFileRequest as SmokeFileRequest
    from quant.chat.standalone import smoke_test_file as smoke_test_file
    from quant.core.errors import CheckError, InputError, QuantError, ToolError
    from quant.evaluate.allocation import AllocationRequest as AllocationRequest
    from quant.evaluate.allocation import allocate as allocate
    from quant.evaluate.request import EvaluationRequest as EvaluationRequest
    from quant.evaluate.request import evaluate_files as evaluate_files
    from quant.job import BuildRequest as BuildRequest
    from quant.job import prepare_job as prepare_job
    from quant.llama.model_file import ModelFile as ModelFile
    from quant.plan.forecast import ReleasePlan as ReleasePlan
    from quant.plan.forecast import plan_model as plan_model
    from quant.plan.load import list_recipes as list_recipes
    from quant.plan.load import load_model as load_model
    from quant.plan.load import load_variant as load_variant
    from quant.plan.plan import Plan as Plan
    from quant.plan.recipe import ModelRecipe as ModelRecipe
    from quant.plan.recipe import Variant as Variant
    from quant.quantize.standalone import QuantizeRequest as QuantizeRequest
    from quant.quantize.standalone import quantize_model as quantize_model
    from quant.release.manifest import Manifest as Manifest
    from quant.release.verify import verify_release as verify_release

_MODULES = {
    "quant.build": ("BuildResult", "build_release"),
    "quant.chat.standalone": ("SmokeFileRequest", "smoke_test_file"),
    "quant.core.errors": ("CheckError", "InputError", "QuantError", "ToolError"),
    "quant.evaluate.allocation": ("AllocationRequest", "allocate"),
    "quant.evaluate.request": ("EvaluationRequest", "evaluate_files"),
    "quant.job": ("BuildRequest", "prepare_job"),
    "quant.llama.model_file": ("ModelFile",),
    "quant.plan.forecast": ("ReleasePlan", "plan_model"),
    "quant.plan.load": ("list_recipes", "load_model", "load_variant"),
    "quant.plan.plan": ("Plan",),
    "quant.plan.recipe": ("ModelRecipe", "Variant"),
    "quant.quantize.standalone": ("QuantizeRequest", "quantize_model"),
    "quant.release.manifest": ("Manifest",),
    "quant.release.verify": ("verify_release",),
}
"""The module of each public name."""

__all__ = [
    "STAGES",
    "AllocationRequest",
    "BuildRequest",
    "BuildResult",
    "CheckError",
    "EvaluationRequest",
    "InputError",
    "Manifest",
    "ModelFile",
    "ModelRecipe",
    "Plan",
    "QuantError",
    "QuantizeRequest",
    "ReleasePlan",
    "SmokeFileRequest",
    "ToolError",
    "Variant",
    "__version__",
    "allocate",
    "build_release",
    "evaluate_files",
    "list_recipes",
    "load_model",
    "load_variant",
    "plan_model",
    "prepare_job",
    "quantize_model",
    "smoke_test_file",
    "verify_release",
]

STAGES = {
    "source": "quant.hub.checkpoint:pull_checkpoint",
    "template": "quant.chat.template:patch_template",
    "convert": "quant.llama.convert:convert_checkpoint",
    "calibrate": "quant.calibration.text:build_calibration_text",
    "imatrix": "quant.calibration.imatrix:compute_imatrix",
    "moments": "quant.calibration.hessians:compute_hessians",
    "plan": "quant.plan.plan:make_plan",
    "quantize": "quant.quantize.variants:quantize_variants",
    "shard": "quant.quantize.shard:shard_base",
    "smoke": "quant.chat.smoke:smoke_test",
    "send": "quant.hub.upload:upload_variant",
    "evaluate": "quant.evaluate.release:evaluate_release",
    "package": "quant.release.package:package_release",
    "deliver": "quant.release.deliver:deliver_release",
    "sign": "quant.release.sign:sign_release",
    "publish": "quant.release.publish:publish_release",
}
"""The stages of a build in their order, and the function of each. ``quant.build`` runs them."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        return version("gguf-foundry")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
