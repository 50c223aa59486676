"""The folder that people get: what is in it, how it is checked, signed and published.

```
manifest         what went in and what came out; the noun that all others read
                 (manifest.schema.json: the same for programs that are not in Python)
inputs           what the stages of a build made, and the manifest of it
card             the model card; its text is templates/card.md.jinja
metadata         what card and files have in common: tags, license, sampling
ollama           what Ollama reads: params and Modelfile (modelfile knows its quoting)
texts            every text file of a release, by name
provenance       the in-toto statement of every input
package          lays all of that out in a folder of the store
folder           a release folder: its lists, and whether its files are the listed ones
deliver          puts the folder at its final name
verify           an independent check of a folder, without network
sign             a signature by the maker's key
license          whether it may be published
change           what publishing would change on the hub
publish          makes that change in one commit
ollama_registry  what Ollama makes of every file, by the hub's rules or by asking the hub
```

Packaging reads from top to bottom: ``package_release`` calls ``make_manifest``, then
``render_texts``. Others call ``package_release``, ``deliver_release``, ``verify_release``,
``sign_release``, ``plan_change`` and ``publish_release``, and read a release by ``Manifest.read``.

The prose of the card may change: edit the template, run ``pytest --update-golden``, read the diff,
and raise the project's version. Then ``quant rebuild`` excuses the new words. The manifest's keys
and values must stay: people verify and rebuild releases that were made before. A new key needs a
default, a line in docs/release-format.md, and ``pytest --update-golden`` for the schema. Any other
change needs a new name of the format.
"""
