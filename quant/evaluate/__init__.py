"""What quantization cost: files measured against their base, and the charts that show it.

```
request            what `quant evaluate` does, from paths to figures; the public entry
texts              the held-out texts of a calibration set
compare            files against a base: what the store has, and what the scorer has to read
scorer             the child program that reads texts with llama.cpp and computes KLD
scores             token scores, and their statistics: figures, intervals, differences; pure
release            the evaluation of a release's variants, a stage of a build
figures            the digits that are published, and what two machines may differ by; pure
pareto             dominated files, and the lower hull; pure
error_measurement  the error table: what each type does to each tensor
probe              files with a few coarse tensors: how sensitive the model is to each
sensitivity_measurement  what `quant probe` does: error table and sensitivities, on several machines
allocation         what `quant allocate` does: measure, or take priors, and allocate types
charts             SVG of KLD, by size and by domain; pure
class_charts       SVG of bits and of errors, by tensor class; pure
html               the report page, which fills templates/report.html.jinja; pure
```

A build calls :func:`release.evaluate_release`. The release's card and page call ``figures`` and
``html``. ``allocation`` measures, and lets :mod:`quant.plan.allocate` decide.

Must stay, because published releases and finished work are compared with them: the keys of
figures, the seed of the bootstrap, and the names in the store's keys. With other names, a large
model is measured again, for days. The page's text and look may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.evaluate.compare import EvaluationSettings
    from quant.evaluate.request import Comparison, EvaluationRequest, evaluate_files
    from quant.evaluate.scores import Estimate, Evaluation, TokenScores

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "EvaluationRequest",
    "EvaluationSettings",
    "TokenScores",
    "evaluate_files",
]

_MODULES = {
    "Comparison": "request",
    "Estimate": "scores",
    "Evaluation": "scores",
    "EvaluationRequest": "request",
    "EvaluationSettings": "compare",
    "TokenScores": "scores",
    "evaluate_files": "request",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: numpy and llama.cpp's bindings load only then."""
    if name in _MODULES:
        return getattr(import_module(f"quant.evaluate.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
