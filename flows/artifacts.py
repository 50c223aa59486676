"""What a run leaves in Prefect's page: the plan as a table, what the model said, the release at a glance."""

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
    """Leave an artifact for a stage whose result is worth a page."""
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
    """Types of a variant, with the number of tensors and the bytes that each takes."""
    counts = {name: sum(t.type.name == name for t in plan.tensors) for name in plan.type_bytes()}
    create_table_artifact(
        key=_key(key),
        table=[
            {"type": n, "tensors": counts[n], "bytes": size}
            for n, size in plan.type_bytes().items()
        ],
        description=f"{plan.variant.name}: {plan.bytes:,} bytes, {plan.bits_per_weight:.3f} bits per weight",
    )


def publish_coverage(key: str, matrix: ImportanceMatrix) -> None:
    """How many tokens the experts of each layer saw."""
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


def publish_conversation(key: str, verdict: SmokeResult) -> None:
    """The scenarios of a smoke test, and every question and answer."""
    create_markdown_artifact(key=_key(key), markdown=format_transcript(verdict))


def publish_figures(key: str, found: ReleaseEvaluation) -> None:
    """How far each file is from BF16, as a whole and by domain."""
    told = [
        f"BF16: PPL {found.base['ppl']}",
        describe_short_kinds(found.too_short),
        *map(str, found.dominated),
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
            for name, whole in found.files.items()
            for domain, f in {"all": whole, **whole["domains"]}.items()
        ],
        description="\n\n".join(filter(None, told)),
    )


def publish_change(key: str, change: Change) -> None:
    """What publishing changes, file by file: who approves a run reads it."""
    create_markdown_artifact(key=_key(key), markdown="\n".join(["```", *change.lines, "```"]))


def publish_release_summary(built: BuildResult) -> None:
    """The table that ends a build."""
    columns = ("variant", "bytes", "bits per weight", "files", "KLD", "top-1", "smoke test")
    create_table_artifact(
        key=_key(f"release-{built.release.name}"),
        table=[
            dict(zip(columns, row, strict=True)) for row in variants_table(built.release.manifest)
        ],
        description="\n\n".join(
            [f"Release in {built.folder}", *list_warnings(built.release.manifest)]
        ),
    )


def _key(text: str) -> str:
    """A key as Prefect allows it: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
