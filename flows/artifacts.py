"""Prefect artifacts of a run: plans, transcripts of smoke tests, figures, the release's table."""

import re
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from quant.build import BuildResult
from quant.calibration import coverage
from quant.calibration.held_out import describe_short_kinds
from quant.calibration.imatrix import ImportanceMatrix
from quant.chat.report import format_transcript
from quant.chat.verdict import SmokeResult
from quant.evaluate.release import ReleaseEvaluation
from quant.plan.plan import Plan
from quant.release.change import Change
from quant.release.publish import Publication
from quant.release.texts import list_warnings, variants_table


def publish_artifact(stage: str, subject: str, result: Any) -> None:
    """Publish the artifact of a stage's result; most results have none."""
    if isinstance(result, Plan):
        publish_plan(f"{stage}-{subject}", result)
    elif isinstance(result, ImportanceMatrix):
        publish_coverage(f"{stage}-{subject}", result)
    elif isinstance(result, SmokeResult):
        publish_conversation(f"{stage}-{subject}", result)
    elif isinstance(result, ReleaseEvaluation):
        publish_figures(f"{stage}-{subject}", result)
    elif isinstance(result, Change):
        publish_change(f"{stage}-{result.target.repo}-change", result)
    elif isinstance(result, Publication):
        create_link_artifact(
            key=_key(f"{stage}-{result.repo}"),
            link=result.url,
            description=f"Commit {result.commit}",
        )


def publish_plan(key: str, plan: Plan) -> None:
    """Publish a variant's types, with the tensors and the bytes of each."""
    counts = {name: sum(t.type.name == name for t in plan.tensors) for name in plan.type_bytes()}
    create_table_artifact(
        key=_key(key),
        table=[
            {"type": n, "tensors": counts[n], "bytes": size}
            for n, size in plan.type_bytes().items()
        ],
        description=f"{plan.variant.name}: {plan.bytes:,} bytes,"
        f" {plan.bits_per_weight:.3f} bits per weight",
    )


def publish_coverage(key: str, matrix: ImportanceMatrix) -> None:
    """Publish how many tokens the experts of each layer got from the calibration text."""
    columns = (
        "layer",
        "matrices",
        "experts",
        "unvisited",
        "least",
        "1st quartile",
        "median",
        "3rd quartile",
        "most",
    )
    create_table_artifact(
        key=_key(key),
        table=[
            dict(zip(columns, row, strict=True)) for row in coverage.make_table_rows(matrix.counts)
        ],
        description=f"{matrix.path.name}: tokens by expert; sha256 {matrix.receipt.sha256}",
    )


def publish_conversation(key: str, result: SmokeResult) -> None:
    """Publish a smoke test: its scenarios, and every question and answer."""
    create_markdown_artifact(key=_key(key), markdown=format_transcript(result))


def publish_figures(key: str, evaluation: ReleaseEvaluation) -> None:
    """Publish KLD and top-1 agreement of each file against BF16, in all and by domain."""
    lines = [
        f"BF16: PPL {evaluation.base['ppl']}",
        describe_short_kinds(evaluation.too_short),
        # One dominated file a paragraph, since Markdown joins lines.
        *map(str, evaluation.dominated),
    ]
    create_table_artifact(
        key=_key(key),
        table=[
            {
                "variant": name,
                "domain": domain,
                "PPL": f["ppl"],
                "KLD": f["kld_mean"],
                "95 %": f"{f['kld_mean_low']} to {f['kld_mean_high']}",
                "KLD 99.9 %": f["kld_p999"],
                "top-1": f["top1"],
            }
            for name, whole in evaluation.files.items()
            for domain, f in {"all": whole, **whole["domains"]}.items()
        ],
        description="\n\n".join(filter(None, lines)),
    )


def publish_change(key: str, change: Change) -> None:
    """Publish what publishing will change, file by file, for the person who approves the run."""
    create_markdown_artifact(key=_key(key), markdown="\n".join(["```", *change.lines, "```"]))


def publish_release_summary(result: BuildResult) -> None:
    """Publish the table of a finished release."""
    columns = ("variant", "bytes", "bits per weight", "files", "KLD", "top-1", "smoke test")
    create_table_artifact(
        key=_key(f"release-{result.release.name}"),
        table=[
            dict(zip(columns, row, strict=True)) for row in variants_table(result.release.manifest)
        ],
        description="\n\n".join(
            [f"Release in {result.folder}", *list_warnings(result.release.manifest)]
        ),
    )


def _key(text: str) -> str:
    """Return a key in Prefect's characters: lower case, digits and dashes."""
    # Any other character is refused with a ValueError, which would fail a finished stage.
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
