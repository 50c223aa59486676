"""The text of a model card below its front matter, for Jinja: what a person who comes for a file needs, in that order."""

BODY = """\
# {{ title }} GGUF

{{ description }}

{% if tested %}
Every file below was talked to through llama-server before it was published: {{ turns }} turns with thinking on and off,
calls of tools, streams, JSON by a schema, and a long prompt. `manifest.json` says what went in and the sha256 of every
tensor; `SHA256SUMS` is for `sha256sum --check`.
{% else %}
These are the sizes that are planned: the files were not made yet, and nothing was measured.
{% endif %}

## Which file?

{% if choices %}
The model has to fit, with the memory of the conversation (KV cache, counted at {{ tokens(context) }} tokens), into the
memory of the GPU and the main memory together, or into unified memory (Apple, AMD Strix Halo, DGX Spark). The largest
that fits is the best that you can run:

| memory in all | take |
|---:|---|
{% for c in choices -%}
| {{ c.memory }} GB | {{ c.name }} |
{% endfor %}

{% endif %}
| {{ columns | join(' | ') }} |
|{{ rules | join('|') }}|
{% for row in rows -%}
| {{ row | join(' | ') }} |
{% endfor %}

Sizes are in units of 10⁹ or 10⁶ bytes. Of a file in several shards, fetch all and give llama.cpp the first.
{% if vision %}
`{{ vision }}` is the part that sees; it goes with every file: `--mmproj {{ vision }}`.
{% endif %}

{% if measured %}
## How near is it to BF16?

Measured on text that neither the importance matrix nor the recipes saw ({{ domains | join(', ') }}): PPL is the perplexity
(BF16: {{ "%.4g" | format(measured.base.ppl) }}), KLD how far the file's probabilities are from BF16's (mean
divergence in nats, ± half of the 95 % interval; less is better), top-1 how often both hold the same word for the likeliest.
{% if measured.too_short %}
Not measured, too little held-out text: {{ measured.too_short | join(', ') }}.
{% endif %}
{% if pictures %}

{% for name, about in pictures -%}
![{{ about }}]({{ name }})

{% endfor %}
`report.html` shows the same to look closer at, without network.
{% endif %}
{% if measured.beaten %}

{% for b in measured.beaten -%}
- Note: {{ b.said }}.
{% endfor %}
{% endif %}

<details>
<summary>KLD by domain</summary>

| file | {{ domains | join(' | ') }} |
|---|{% for _ in domains %}---:|{% endfor %}

{% for name, cells in by_domain -%}
| {{ name }} | {{ cells | join(' | ') }} |
{% endfor %}

</details>

{% endif %}
## Run it

Fetch `{{ example.name }}`, for instance:

```
hf download {{ repo }} --include "{{ pattern }}" --local-dir {{ title }}-GGUF
```

### llama.cpp

```
llama-cli -m {{ title }}-GGUF/{{ first }} --jinja -c {{ context }} {{ flags }}
```

`--jinja` uses the chat template in the file; the sampling is in its metadata too, so current programs take it by themselves.
{% if experts %}
With a GPU that cannot hold all of it, let it hold everything but the experts, which stay in main memory; the less you leave
there, the faster it goes:

```
-ngl 99 -ot ".ffn_.*_exps.=CPU"            # all experts in main memory: the least of the GPU
-ngl 99 -ot ".ffn_(up|down)_exps.=CPU"     # a third of them on the GPU
-ngl 99 -ot ".ffn_up_exps.=CPU"            # two thirds of them on the GPU
-ngl 99 --n-cpu-moe 40                     # those of the first 40 layers in main memory
```

{% endif %}
### llama-server and any OpenAI client

```
llama-server -m {{ title }}-GGUF/{{ first }} --jinja -c {{ context }} --port 8080
```

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
answer = client.chat.completions.create(
    model="{{ title }}",
    messages=[{"role": "user", "content": "Hello!"}],
    temperature={{ sampling.temperature }},
    top_p={{ sampling.top_p }},
    extra_body={"chat_template_kwargs": {"enable_thinking": False}},  # leave it out to let the model think
)
print(answer.choices[0].message.content)
```

### Ollama

{% if single %}
```
ollama run hf.co/{{ repo }}:{{ single_name }}
```

`{{ single }}` is one unsplit file, which Ollama can pull; `params`
{%- if go_template %}, `template`{% endif %} and `Modelfile` belong to it.
{% if ternary %}
Its name is only a tag that Ollama takes: it holds no tensor of ggml's ternary type TQ1_0.
{% endif %}
{% endif %}
{% if sharded %}
Ollama cannot pull shards. Put those of another variant together first, and name the result in a copy of `Modelfile`:

```
llama-gguf-split --merge {{ sharded.first }} {{ sharded.merged }}
ollama create {{ title | lower }} -f Modelfile
```

{% endif %}
## Long conversations

{% if cache %}
The KV cache takes {{ size(cache) }} for {{ tokens(context) }} tokens in F16{{ long }}.
In Q8_0 it takes half of that, for hardly any loss:

```
-fa on -ctk q8_0 -ctv q8_0
```
{% else %}
A KV cache in Q8_0 takes half the memory, for hardly any loss: `-fa on -ctk q8_0 -ctv q8_0`.
{% endif %}

## Settings

temperature {{ sampling.temperature }}, top_p {{ sampling.top_p }}, top_k {{ sampling.top_k }}, min_p {{ sampling.min_p }},
repeat penalty {{ sampling.repeat_penalty }}; they are in the files' metadata and in `params` too.

{% if waived %}
## Waived

These checks failed, and the files were published all the same:

{% for name, why, files in waived -%}
- {{ name }}, in {{ files | join(', ') }}: {{ why }}
{% endfor %}

{% endif %}
{% if fixes %}
## What was mended in the chat template

{% for why in fixes -%}
- {{ why }}
{% endfor %}

The template stands in every file, and as `chat_template.jinja` beside them.

{% endif %}
## How it was made

By GGUF Foundry, with llama.cpp {{ llama_cpp }}, from {{ source }}.
{% if documents %}
The importance matrix (`{{ matrix }}`) was computed over {{ documents }} documents of conversation, code and tools, rendered
with the model's own chat template{% if fixes %}, as it was mended{% endif %}.
{% endif %}{% if fed_back %}
Rounding was fed back: levels and scales were chosen by the second moments of every matrix' inputs on the same text (where the
architecture allows it, each token counted by how much it matters for what the model says), so that what one weight lost is
mended by others. Types and sizes are llama-quantize's, the bytes are not.
{% endif %}

What each file holds, rule by rule; of the rules that match a tensor, the first decides:

{% for v in variants if v.recipe.rules -%}
<details>
<summary>{{ v.name }}: {{ types(v) }}</summary>

| tensors | type | why |
|---|---|---|
{% for tensors, type, why in rules_of(v) -%}
| {{ tensors }} | {{ type }} | {{ why }} |
{% endfor %}

</details>

{% endfor %}
## Verify it, make it again

```
sha256sum --check SHA256SUMS                   # the files are whole
quant verify .                                 # and hold what manifest.json says: types, tensors, shards, this card
quant rebuild manifest.json -o elsewhere       # makes the release again from its sources, and compares every byte
```

`provenance.json` is an in-toto statement (SLSA v1) of everything that went in, with the sha256 of every file.
"""
