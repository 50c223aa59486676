"""The model card: the manifest in, Markdown out. Pure. Its text is templates/card.md.jinja."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from quant.core.format import human_bytes
from quant.evaluate.figures import format_figures
from quant.plan.recipe import ModelRecipe, Sampling
from quant.release.manifest import (
    FiguresRecord,
    Manifest,
    MemoryRecord,
    ScenarioRecord,
    SourceRecord,
    VariantRecord,
    to_plain,
)
from quant.release.metadata import TAGS, find_pipeline_tag

MEMORIES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
"""Memory of common machines, GPU and main memory together, in GB."""
USABLE = 0.95
"""Fraction of it that the system and llama.cpp's compute buffers leave."""

BITS_CHART = "pictures/bits.svg"
CHARTS = (
    ("pictures/kld-by-size.svg", "KLD by size, with the lower hull"),
    (BITS_CHART, "Bits per weight by class and layer"),
    ("pictures/error-by-class.svg", "Error by class"),
    ("pictures/kld-by-domain.svg", "KLD by domain"),
)
"""The charts of a release that was measured: see :mod:`quant.evaluate.html`."""

Variants = Sequence[VariantRecord]


@dataclass(frozen=True)
class Column:
    """A column of the table of files."""

    title: str
    rule: str
    """How Markdown aligns it."""
    cell: Callable[[VariantRecord], str]


def render_card(model: ModelRecipe, manifest: Manifest) -> str:
    """Return README.md of a release, with the front matter that the hub reads.

    The card of a manifest whose variants were not tested says that it is a plan.
    """
    from huggingface_hub import ModelCardData  # takes half a second

    front_matter = ModelCardData(
        **model.card.front_matter,
        # The hub then lists the release below its base model, among the quantizations.
        base_model_relation="quantized" if model.card.base else None,
        library_name="gguf",
        pipeline_tag=find_pipeline_tag(model),
        quantized_by=model.publish.quantizer,
        tags=list(TAGS),
    )
    body = _load_template().render(_collect_values(model, manifest))
    return f"---\n{front_matter.to_yaml()}\n---\n\n{_squeeze(body)}"


def format_quality(figures: FiguresRecord | None) -> tuple[str, str, str]:
    """Return perplexity, KLD with half of its interval, and top-1; dashes without figures."""
    return format_figures(to_plain(figures) if figures else None)


def summarize_smoke(scenarios: Sequence[ScenarioRecord]) -> str:
    """Return the result of a smoke test in a few words."""
    failed = dict.fromkeys(s.name for s in scenarios if not s.passed)
    return "passed" if not failed else f"passed; off: {', '.join(failed)}"


@cache
def _load_template() -> Any:
    # Not huggingface_hub's ModelCard.from_template: there an unknown name renders as nothing.
    environment = Environment(
        loader=PackageLoader("quant.release"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markdown, not HTML.
        autoescape=False,
    )
    return environment.get_template("card.md.jinja")


def _collect_values(model: ModelRecipe, manifest: Manifest) -> dict[str, Any]:
    """Return everything that the template names."""
    variants, evaluation = manifest.variants, manifest.evaluation
    example, single = _choose_example(variants), manifest.single_file
    first = example.files[0].path
    context, longest = model.ollama.num_ctx, model.context_length or 0
    cache_bytes = manifest.kv_bytes_per_token * context
    columns = _list_columns(manifest, cache_bytes)
    template = manifest.chat_template
    replacements = template.patch.replacements if template and template.patch else ()
    return {
        "title": model.title,
        "description": model.card.description
        or f"{model.card.base or model.title}, quantized for llama.cpp.",
        "repo": model.publish.repo or f"OWNER/{model.title}-GGUF",
        "tested": manifest.tested,
        "turns": len(model.smoke),
        "sampling": model.sampling,
        "flags": _format_flags(model.sampling),
        # the table of files
        "choices": list(_choose_by_memory(variants, cache_bytes)) if cache_bytes else [],
        "columns": [c.title for c in columns],
        "rules": [c.rule for c in columns],
        "rows": [[c.cell(v) for c in columns] for v in variants],
        "vision": manifest.vision.path if manifest.vision else None,
        # quality
        "evaluation": evaluation,
        "domains": list(evaluation.texts) if evaluation else [],
        "by_domain": [
            (v.name, [format_figures(to_plain(f))[1] for f in v.evaluation.domains.values()])
            for v in variants
            if v.evaluation and not v.is_base
        ],
        "charts": _list_charts(variants),
        # the commands
        "example": example,
        "first": first,
        "pattern": f"{example.name}/*" if len(example.files) > 1 else first,
        "experts": any(v.memory.experts for v in variants),
        "single": single.files[0].path if single else None,
        "single_tag": single.name.removeprefix("UD-") if single else None,
        "ternary": single is not None and "TQ" in single.name,
        "go_template": bool(manifest.ollama_template),
        "sharded": first if len(example.files) > 1 else None,
        "merged": first.rpartition("/")[2].rpartition("-00001-of-")[0] + ".gguf",
        # memory
        "size": human_bytes,
        "context": context,
        "cache": cache_bytes,
        "longest": longest,
        "longest_cache": manifest.kv_bytes_per_token * longest,
        # how it was made
        "waived": _list_waived(manifest),
        "fixes": [" ".join(r.why.split()) for r in replacements],
        "llama_cpp": manifest.llama_cpp,
        "source": _link_source(manifest.source),
        "documents": manifest.calibration.documents,
        "matrix": manifest.imatrix.path,
        "compensated": model.imatrix.feedback,
        "recipes": [
            (f"{v.name}: {_format_types(v)}", list(_list_rules(v)))
            for v in variants
            if not v.is_base
        ],
    }


def _list_columns(manifest: Manifest, cache_bytes: int) -> list[Column]:
    """Return the table of files, column by column."""
    columns = [
        Column("file", "---", _link_variant),
        Column("size", "---:", lambda v: human_bytes(v.bytes)),
        Column("bits per weight", "---:", lambda v: f"{v.bpw:.2f}"),
        Column("files", "---:", lambda v: str(len(v.files))),
    ]
    if cache_bytes:
        columns += [
            Column("memory in all", "---:", lambda v: human_bytes(v.memory.weights + cache_bytes)),
            Column(
                "GPU + main memory for experts",
                "---:",
                lambda v: _format_halves(v.memory, cache_bytes),
            ),
        ]
    if any(v.evaluation for v in manifest.variants):
        columns += [
            Column("PPL", "---:", lambda v: format_quality(v.evaluation)[0]),
            Column("KLD", "---:", lambda v: format_quality(v.evaluation)[1]),
            Column("top-1", "---:", lambda v: format_quality(v.evaluation)[2]),
        ]
    columns.append(Column("for whom", "---", lambda v: _escape_cell(v.summary)))
    if manifest.tested:
        columns.append(
            Column("smoke test", "---", lambda v: _escape_cell(summarize_smoke(v.smoke)))
        )
    return columns


def _choose_by_memory(variants: Variants, cache_bytes: int) -> Iterator[tuple[int, str]]:
    """Yield memory in GB and the largest variant that fits, wherever that is another one."""
    # Files for one kind of processor, and those for making other files, are nobody's first choice.
    ladder = [v for v in variants if v.name.startswith("UD-")]
    candidates = ladder or [v for v in variants if not v.is_base]
    last = None
    for memory in MEMORIES:
        # Memory is sold in GiB. Counting 10^9 bytes for each errs on the safe side.
        usable = USABLE * memory * 10**9
        fitting = [v for v in candidates if v.memory.weights + cache_bytes <= usable]
        best = max(fitting, key=lambda v: v.bytes, default=None)
        if best is not None and best.name != last:
            last = best.name
            yield memory, last


def _choose_example(variants: Variants) -> VariantRecord:
    """Return the variant that the commands show: sharded if one is, and quantized if one is."""
    quantized = [v for v in variants if not v.is_base] or list(variants)
    sharded = [v for v in quantized if len(v.files) > 1]
    return sharded[len(sharded) // 2] if sharded else quantized[0]


def _list_charts(variants: Variants) -> list[tuple[str, str]]:
    """Return the charts that a release has: without a quantized file, only the one of types."""
    measured = [v for v in variants if v.evaluation]
    if any(not v.is_base for v in measured):
        return list(CHARTS)
    return [chart for chart in CHARTS if measured and chart[0] == BITS_CHART]


def _list_waived(manifest: Manifest) -> list[tuple[str, str, list[str]]]:
    """Return every failure that was waived: its name, the reason, and where it failed."""
    template = manifest.chat_template
    waived = {
        (name, why): ["the chat template"]
        for name, why in ((template and template.waived) or {}).items()
    }
    for variant in manifest.variants:
        for s in variant.smoke:
            if s.waived:
                waived.setdefault((s.name, s.waived), []).append(variant.name)
    return [(name, _escape_cell(why), places) for (name, why), places in waived.items()]


def _list_rules(variant: VariantRecord) -> Iterator[tuple[str, str, str]]:
    """Yield the rules that decided a tensor's type: tensors, type, reason."""
    for n in variant.decided:
        rule = variant.recipe.rules[n]
        where = ""
        if rule.depth and rule.depth[0] < 1:
            begin, end = (min(round(100 * fraction), 100) for fraction in rule.depth)
            where = f", {begin} to {end} % of the depth"
        elif rule.depth:  # blocks for multi-token prediction have depth 1
            where = ", behind the trunk"
        yield f"`{_escape_cell(rule.tensors)}`{where}", rule.type, _escape_cell(rule.why)


def _link_variant(variant: VariantRecord) -> str:
    files = variant.files
    return f"[{variant.name}]({files[0].path if len(files) == 1 else variant.name})"


def _link_source(source: SourceRecord) -> str:
    repo, commit = source.repo, source.revision
    if repo is None:
        return f"the checkpoint `{source.folder}`"
    return f"[{repo}](https://huggingface.co/{repo}/tree/{commit}) at commit `{commit}`"


def _format_halves(memory: MemoryRecord, cache_bytes: int) -> str:
    if not memory.experts:
        return "-"
    gpu = human_bytes(memory.weights - memory.experts + cache_bytes)
    return f"{gpu} + {human_bytes(memory.experts)}"


def _format_types(variant: VariantRecord) -> str:
    total = sum(variant.bytes_by_type.values())
    shares = {name: 100 * size / total for name, size in variant.bytes_by_type.items()}
    # A smaller fraction would read 0 %.
    return ", ".join(
        f"{name} {percent:.0f} %" for name, percent in shares.items() if percent >= 0.5
    )


def _format_flags(s: Sampling) -> str:
    flags = f"--temp {s.temperature} --top-p {s.top_p} --top-k {s.top_k} --min-p {s.min_p}"
    return flags if s.repeat_penalty == 1.0 else f"{flags} --repeat-penalty {s.repeat_penalty}"


def _escape_cell(text: str) -> str:
    """Return text for a cell of a Markdown table, which bars and line ends would break."""
    return " ".join(text.split()).replace("|", "\\|")


def _squeeze(text: str) -> str:
    """Return the text with at most one empty line in a row and none at the end."""
    kept: list[str] = []
    # Blocks of the template that do not apply leave their empty lines behind.
    for line in text.splitlines():
        if line.strip() or (kept and kept[-1]):
            kept.append(line.rstrip())
    return "\n".join(kept).rstrip() + "\n"
