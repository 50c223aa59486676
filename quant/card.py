"""The model card of a release. Pure: the manifest in, Markdown out."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from quant.recipe import Model

BODY = """\
# {{ title }} GGUF

{{ description }}

Every file below was talked to over {{ turns }} turns through llama-server, with thinking on and off, before it was
published. `manifest.json` says what went in and the sha256 of every tensor; `SHA256SUMS` is for `sha256sum --check`.

| file | size | bits per weight | for whom |
|---|---:|---:|---|
{% for v in variants -%}
| {{ link(v) }} | {{ size(v.bytes) }} | {{ '%.2f' | format(v.bpw) }} | {{ cell(v.summary) }} |
{% endfor %}

Sizes are in units of 10⁹ or 10⁶ bytes. Of a file in several shards, give llama.cpp the first.

{% if single %}
## Ollama

`{{ single }}` is one file under a tag that Ollama can pull; the name is only that tag: it holds no tensor of ggml's
ternary type TQ1_0. `Modelfile` belongs to it. Other variants: put the shards together first,

```
llama-gguf-split --merge {{ first_shard }} {{ merged }}
```

{% endif %}
{% if vision %}
## Pictures

`{{ vision }}` is the part that sees; it goes with every file above: `--mmproj {{ vision }}`.

{% endif %}
## Settings

temperature {{ sampling.temperature }}, top_p {{ sampling.top_p }}, top_k {{ sampling.top_k }}, min_p {{ sampling.min_p }},
repeat penalty {{ sampling.repeat_penalty }}; they are in the files' metadata and in `params` too.

## How it was made

llama.cpp {{ llama_cpp }}; importance matrix over {{ documents }} documents of conversation, code and tools, rendered with the
model's own chat template{% if patched %}, which was patched so that the second turn works{% endif %}.
"""


def card(model: Model, manifest: Mapping[str, Any]) -> str:
    """README.md of a release, with the front matter that the hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=model.card.base_model,
        base_model_relation="quantized" if model.card.base_model else None,
        language=list(model.card.languages),
        library_name="gguf",
        license=model.card.license,
        pipeline_tag="text-generation",
        tags=["gguf", "imatrix", "conversational"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(model, manifest)}"


def _body(model: Model, manifest: Mapping[str, Any]) -> str:
    variants = manifest["variants"]
    template = manifest["chat_template"]
    sharded = next((v for v in variants if len(v["files"]) > 1), None)
    env = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    return env.from_string(BODY).render(
        title=model.title,
        description=model.card.description or f"Quantisations of {model.card.base_model or model.title} for llama.cpp.",
        turns=len(model.smoke),
        variants=variants,
        link=_link,
        size=human_bytes,
        cell=_cell,
        single=next((v["files"][0]["path"] for v in variants if v["name"].endswith("TQ1_0")), None),
        first_shard=sharded["files"][0]["path"] if sharded else "FIRST-SHARD.gguf",
        merged=f"{model.title}-{sharded['name']}.gguf" if sharded else "OUT.gguf",
        sampling=model.sampling,
        llama_cpp=manifest["llama.cpp"],
        documents=manifest["calibration"]["documents"],
        vision=manifest["vision"]["path"] if manifest.get("vision") else None,
        patched=template is not None and template["sha256"] != template["original_sha256"],
    )


def human_bytes(size: int) -> str:
    """A size for people: 135.2 GB, 2.7 MB; units are powers of 1000, as disks and hubs count."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1000:.1f} kB"


def _cell(text: str) -> str:
    """Text in a cell of a table, whose columns are parted by bars and whose rows end with the line."""
    return " ".join(text.split()).replace("|", "\\|")


def _link(variant: Mapping[str, Any]) -> str:
    files = variant["files"]
    if len(files) == 1:
        return f"[{variant['name']}]({files[0]['path']})"
    return f"[{variant['name']}]({variant['name']}) ({len(files)} shards)"
