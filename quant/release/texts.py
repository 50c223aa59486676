"""The small files of a release, as text: card, report, charts, and what Ollama reads."""

from collections.abc import Mapping, Sequence

from quant.calibration import held_out
from quant.core.format import to_pretty_json
from quant.evaluate import html
from quant.evaluate.html import ReportFile
from quant.release.card import format_quality, render_card, summarize_smoke
from quant.release.folder import README
from quant.release.inputs import ReleaseInputs
from quant.release.manifest import Manifest, to_plain
from quant.release.ollama import make_params, render_modelfile


def render_texts(inputs: ReleaseInputs, manifest: Manifest) -> dict[str, str]:
    """Return every text file of a release but its lists, by name."""
    model = inputs.model
    texts: dict[str, str | None] = {
        README: render_card(model, manifest),
        **_render_report(manifest, model.title),
        "params": to_pretty_json(make_params(model)),
        "system": model.ollama.system or None,
        "chat_template.jinja": inputs.template.text if inputs.template else None,
        "template": manifest.ollama_template or None,
    }
    # FROM names one file, so a release without an unsplit variant has no Modelfile.
    if single := manifest.single_file:
        texts["Modelfile"] = render_modelfile(model, single.files[0].path)
    return {name: text for name, text in texts.items() if text is not None}


def list_warnings(manifest: Manifest) -> Sequence[str]:
    """Return what is no fault but worth knowing: files that others dominate."""
    return [b.said for b in manifest.evaluation.beaten] if manifest.evaluation else []


def variants_table(manifest: Manifest) -> Sequence[Sequence[str]]:
    """Return a row a variant: name, bytes, bits per weight, files, KLD, top-1, smoke test."""
    return [
        (
            v.name,
            f"{v.bytes:,}",
            f"{v.bpw:.2f}",
            str(len(v.files)),
            *format_quality(v.evaluation)[1:],
            summarize_smoke(v.smoke),
        )
        for v in manifest.variants
    ]


def _render_report(manifest: Manifest, title: str) -> Mapping[str, str]:
    """Return the report page and its charts; nothing if nothing was measured."""
    evaluation = manifest.evaluation
    measured = _list_measured(manifest)
    if not (evaluation and measured):
        return {}
    charts = html.draw_charts(measured, title)
    skipped = held_out.describe_short_kinds(evaluation.too_short or ())
    notes = [*list_warnings(manifest), *([skipped] if skipped else [])]
    return {
        **{f"{html.PICTURES}/{name}": svg for name, (_, svg) in charts.items()},
        html.REPORT: html.render_report(measured, title, evaluation.base.ppl, notes),
    }


def _list_measured(manifest: Manifest) -> list[ReportFile]:
    return [
        ReportFile(
            name=v.name,
            bytes=v.bytes,
            figures=to_plain(v.evaluation),
            tensors={name: t.type for name, t in v.tensors.items()},
            is_base=v.is_base,
        )
        for v in manifest.variants
        if v.evaluation
    ]
