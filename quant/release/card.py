"""The model card of a release. Pure: the manifest in, Markdown out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined

from quant.core.format import human_bytes
from quant.evaluate.figures import format_figures
from quant.plan.recipe import ModelRecipe
from quant.release.card_body import BODY
from quant.release.metadata import tags, task

MEMORIES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
"""Memory that people have, GPU and main memory together, in GB."""
USABLE = 0.95
"""What the system and the buffers of computation leave of it."""

BITS = "pictures/bits.svg"
PICTURES = (
    ("pictures/kld-by-size.svg", "KLD against size, with the lower hull"),
    (BITS, "Bits per weight by class and layer"),
    ("pictures/error-by-class.svg", "Error by class"),
    ("pictures/kld-by-domain.svg", "KLD by domain"),
)
"""Of a release that was measured: see :mod:`quant.evaluate.html`."""

Variants = Sequence[Mapping[str, Any]]


def render_card(model: ModelRecipe, manifest: Mapping[str, Any]) -> str:
    """README.md of a release, with the front matter that the hub reads.

    A manifest whose variants were not talked to is a plan, and its card says so.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        **model.card.front_matter,
        base_model_relation="quantized" if model.card.base else None,
        library_name="gguf",
        pipeline_tag=task(model),
        quantized_by=model.publish.by,
        tags=tags(model),
    )
    # Not ModelCard.from_template: it lets a name that is not known pass as nothing.
    env = Environment(
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    body = env.from_string(BODY).render(_values(model, manifest))
    return f"---\n{data.to_yaml()}\n---\n\n{_tidy(body)}"


def single_file(variants: Variants) -> Mapping[str, Any] | None:
    """The variant for Ollama: the first that is one file by its recipe, whatever its name."""
    return next((v for v in variants if not v["recipe"]["split"]), None)


def smoke_words(scenarios: Sequence[Mapping[str, Any]]) -> str:
    """A verdict in a few words."""
    failed = dict.fromkeys(s["name"] for s in scenarios if not s["passed"])
    return "passed" if not failed else f"passed; off: {', '.join(failed)}"


def _waived(variants: Variants, template: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """What failed and was published all the same: its name, why, and where: in the template, or in which variants."""
    found = {(name, why): ["the chat template"] for name, why in template.get("waived", {}).items()}
    for variant in variants:
        for s in variant.get("smoke", ()):
            if why := s.get("waived"):
                found.setdefault((s["name"], why), []).append(variant["name"])
    return [(name, _cell(why), files) for (name, why), files in found.items()]


def _values(model: ModelRecipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    variants: Variants = manifest["variants"]
    single, sharded, example = single_file(variants), _sharded(variants), _example(variants)
    kv, context = manifest["kv_bytes_per_token"], model.ollama.num_ctx
    template = manifest["chat_template"] or {}
    longest = model.context_length or 0
    tested = all(v.get("smoke") for v in variants)
    columns = _columns(variants, kv * context, tested)
    return {
        "title": model.title,
        "description": model.card.description
        or f"Quantisations of {model.card.base or model.title} for llama.cpp.",
        "turns": len(model.smoke),
        "fed_back": model.imatrix.feedback,
        "waived": _waived(variants, template),
        "measured": manifest.get("evaluation"),
        "pictures": _pictures(variants),
        "domains": list((manifest.get("evaluation") or {}).get("texts", ())),
        "by_domain": [
            (v["name"], [format_figures(f)[1] for f in v["evaluation"]["domains"].values()])
            for v in variants
            if v.get("evaluation") and v["recipe"]["rules"]
        ],
        "tested": tested,
        "variants": variants,
        "columns": [name for name, _, _ in columns],
        "rules": [rule for _, rule, _ in columns],
        "rows": [[cell(v) for _, _, cell in columns] for v in variants],
        "choices": list(_choices(variants, kv * context)) if kv else [],
        "context": context,
        "tokens": lambda n: f"{n:,}",
        "cache": kv * context,
        "long": f", {human_bytes(kv * longest)} for the {longest:,} that the model was made for"
        if longest > context
        else "",
        "experts": any(v["memory"]["experts"] for v in variants),
        "example": example,
        "first": example["files"][0]["path"],
        "pattern": f"{example['name']}/*"
        if len(example["files"]) > 1
        else example["files"][0]["path"],
        "repo": model.publish.repo or f"OWNER/{model.title}-GGUF",
        "flags": _flags(model),
        "sampling": model.sampling,
        "single": single["files"][0]["path"] if single else None,
        "single_name": single["name"].removeprefix("UD-") if single else None,
        "ternary": single is not None and "TQ" in single["name"],
        "go_template": bool(manifest.get("ollama_template")),
        "sharded": sharded,
        "vision": manifest["vision"]["path"] if manifest.get("vision") else None,
        "fixes": [
            " ".join(r["why"].split())
            for r in (template.get("patch") or {}).get("replacements", ())
        ],
        "llama_cpp": manifest["llama.cpp"],
        "source": _source(manifest["source"]),
        "documents": (manifest.get("calibration") or {}).get("documents"),
        "matrix": (manifest.get("imatrix") or {}).get("path"),
        "size": human_bytes,
        "types": _types,
        "rules_of": _rules,
    }


def _pictures(variants: Variants) -> list[tuple[str, str]]:
    """Those that a release has: without a quantised file, only that of the types."""
    measured = [v for v in variants if v.get("evaluation")]
    lost = any(v["recipe"]["rules"] for v in measured)
    return [(path, about) for path, about in PICTURES if lost or (measured and path == BITS)]


def _columns(
    variants: Variants, cache: int, tested: bool
) -> list[tuple[str, str, Callable[[Mapping[str, Any]], str]]]:
    """The table of files: what a column is called, its rule in Markdown, and its cell for a variant."""
    columns: list[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = [
        ("file", "---", _link),
        ("size", "---:", lambda v: human_bytes(v["bytes"])),
        ("bits per weight", "---:", lambda v: f"{v['bpw']:.2f}"),
        ("files", "---:", lambda v: str(len(v["files"]))),
    ]
    if cache:
        columns.append(
            ("memory in all", "---:", lambda v: human_bytes(v["memory"]["weights"] + cache))
        )
        columns.append(
            ("GPU + main memory for experts", "---:", lambda v: _halves(v["memory"], cache))
        )
    if any(v.get("evaluation") for v in variants):
        columns += [
            ("PPL", "---:", lambda v: format_figures(v["evaluation"])[0]),
            ("KLD", "---:", lambda v: format_figures(v["evaluation"])[1]),
            ("top-1", "---:", lambda v: format_figures(v["evaluation"])[2]),
        ]
    columns.append(("for whom", "---", lambda v: _cell(v["summary"])))
    if tested:
        columns.append(("smoke test", "---", lambda v: _cell(smoke_words(v["smoke"]))))
    return columns


def _choices(variants: Variants, cache: int) -> Iterator[dict[str, Any]]:
    """For each amount of memory that makes a difference, the largest variant that fits."""
    # Those for one kind of processor or for making other files are nobody's first choice.
    ladder = [v for v in variants if v["name"].startswith("UD-")] or [
        v for v in variants if v["recipe"]["rules"]
    ]
    before = None
    for memory in MEMORIES:
        fitting = [v for v in ladder if v["memory"]["weights"] + cache <= USABLE * memory * 10**9]
        best = max(fitting, key=lambda v: v["bytes"], default=None)
        if best is not None and best["name"] != before:
            before = best["name"]
            yield {"memory": memory, "name": before}


def _halves(memory: Mapping[str, int], cache: int) -> str:
    if not memory["experts"]:
        return "-"
    return f"{human_bytes(memory['weights'] - memory['experts'] + cache)} + {human_bytes(memory['experts'])}"


def _example(variants: Variants) -> Mapping[str, Any]:
    """The variant that the commands show: in shards if one is, and never the unquantised weights if there is another."""
    quantised = [v for v in variants if v["recipe"]["rules"]] or list(variants)
    sharded = [v for v in quantised if len(v["files"]) > 1]
    return sharded[len(sharded) // 2] if sharded else quantised[0]


def _sharded(variants: Variants) -> dict[str, str] | None:
    shown = _example(variants)
    if len(shown["files"]) < 2:
        return None
    first = shown["files"][0]["path"]
    return {
        "first": first,
        "merged": first.rpartition("/")[2].rpartition("-00001-of-")[0] + ".gguf",
    }


def _source(source: Mapping[str, Any]) -> str:
    if "repo" in source:
        repo, commit = source["repo"], source["revision"]
        return f"[{repo}](https://huggingface.co/{repo}/tree/{commit}) at commit `{commit}`"
    return f"the checkpoint `{source['folder']}`"


def _types(variant: Mapping[str, Any]) -> str:
    total = sum(variant["bytes_by_type"].values())
    shares = {name: 100 * size / total for name, size in variant["bytes_by_type"].items()}
    return ", ".join(f"{name} {share:.0f} %" for name, share in shares.items() if share >= 0.5)


def _rules(variant: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The rules that decided something: which tensors, type, why."""
    for n in variant["decided"]:
        rule = variant["recipe"]["rules"][n]
        where = ""
        if rule["depth"] and rule["depth"][0] < 1:
            begin, end = (min(round(100 * share), 100) for share in rule["depth"])
            where = f", {begin} to {end} % of the depth"
        elif rule["depth"]:
            where = ", behind the trunk"
        yield f"`{_cell(rule['tensors'])}`{where}", rule["type"], _cell(rule["why"])


def _flags(model: ModelRecipe) -> str:
    s = model.sampling
    flags = f"--temp {s.temperature} --top-p {s.top_p} --top-k {s.top_k} --min-p {s.min_p}"
    return flags if s.repeat_penalty == 1.0 else f"{flags} --repeat-penalty {s.repeat_penalty}"


def _cell(text: str) -> str:
    """Text in a cell of a table, whose columns are parted by bars and whose rows end with the line."""
    return " ".join(text.split()).replace("|", "\\|")


def _link(variant: Mapping[str, Any]) -> str:
    files = variant["files"]
    return f"[{variant['name']}]({files[0]['path'] if len(files) == 1 else variant['name']})"


def _tidy(text: str) -> str:
    """At most one empty line in a row, and none at the end: conditions of the template leave more."""
    kept: list[str] = []
    for line in text.splitlines():
        if line.strip() or (kept and kept[-1]):
            kept.append(line.rstrip())
    return "\n".join(kept).rstrip() + "\n"
