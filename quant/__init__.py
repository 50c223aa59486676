"""From a checkpoint on the hub to a tested GGUF release."""

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
