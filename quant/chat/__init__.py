"""Chat templates and smoke tests: what a model reads, and whether a file answers well.

Two things are tested here. A *template* is rendered with some sixty test conversations in every
engine that meets it, without the model. A *file* is served by llama-server and talked to over
several turns.

```
families       facts of a model family (recipes/families), or what a template tells by itself
messages       messages as clients send them, and placeholders for what families write; pure
conversations  the test conversations, as data; pure
renderings     which texts of a conversation are rendered; pure
rules          what must hold of these texts, and which client breaks otherwise; pure
template       patch a template by exact replacements, render it with Jinja; pure
patch_hints    why an anchor of a patch does not fit; pure
sandbox        the child process in which a stranger's template is rendered
engines        render in the sandbox and in llama-server
stub_model     the model of some kilobytes that llama-server needs for it
go_template    Ollama's Go templates
check          `quant template check`: all of that for one template
gguf_patch     `quant template patch`: another template in an existing GGUF

scenarios      what a smoke test asks, as data (recipes/scenarios)
schema         JSON values against JSON schemas, by jsonschema; pure
file_checks    checks of a file that need no answer: template, tokens, weights
reply_checks   checks of one reply; pure
runner         runs scenarios with a server and records the checks
verdict        the record of a file and its judgment; pure
smoke          the stage of a build: serve, run, store, judge
standalone     the same for a file outside of a build: what `quant smoke` calls
report         the result as a transcript and as JUnit XML; pure
```

Other packages call ``check.require_template`` and ``smoke.smoke_test`` (the stages of a build),
``template.patch_template`` and ``render_template`` (the calibration text), and read
``verdict.SmokeResult``.

To change: a fact of a family is a line in recipes/families. A new demand on templates is a function
in ``rules``, and increases ``check.RULES``. A new demand on replies is one in ``reply_checks``, and
increases ``smoke.CHECKS``. Must stay: the names of conversations and checks, because recipes waive
them by name; the keys of ``SmokeRun.json`` and ``SmokeResult.json``; the renderings of
tests/golden/templates. Only ``sandbox`` runs a template that is not this project's own.
"""
