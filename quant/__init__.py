"""From a checkpoint on the hub to a tested GGUF release. One module a stage, in the order of :data:`STAGES`."""

STAGES = (
    "source",
    "template",
    "convert",
    "calibrate",
    "imatrix",
    "moments",
    "plan",
    "quantize",
    "shard",
    "smoke",
    "send",
    "evaluate",
    "package",
    "deliver",
    "sign",
    "publish",
)
"""The way of a release. ``quant.build`` walks it; every name is a module of this package with a verb of its own."""
