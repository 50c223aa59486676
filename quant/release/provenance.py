"""Where a release comes from, as an in-toto statement with a SLSA v1 predicate. Pure: the manifest in, plain JSON out.

It holds only what is the same whenever the same release is made: times, hosts and paths are in the run's record beside the
release.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from quant.core.format import hash_json

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILDER = "urn:gguf-foundry"
SHAPING = (
    "gguf",
    "huggingface-hub",
    "jinja2",
    "llama-cpp-python",
    "numpy",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages whose version can change a byte of a release."""


def make_statement(
    manifest: Mapping[str, Any],
    subjects: Mapping[str, str],
    packages: Mapping[str, str],
    version: str,
    tools: Mapping[str, Any],
) -> dict[str, Any]:
    """The statement about files with these digests, made by this version of the project with these packages.

    ``tools`` is how llama.cpp was built, as :attr:`quant.llama.toolchain.Toolchain.built` tells it.
    """
    model = manifest["recipe"]
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": sha}} for name, sha in sorted(subjects.items())
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{BUILDER}:release:4",
                "externalParameters": {
                    "model": manifest["model"],
                    "variants": [v["name"] for v in manifest["variants"]],
                    "source": {k: v for k, v in manifest["source"].items() if k != "files"},
                },
                "internalParameters": {
                    "imatrix": model["imatrix"],
                    "max_shard_size": model["max_shard_size"],
                    "pre_tokenizer": model["pre_tokenizer"],
                    "llama.cpp": {"version": manifest["llama.cpp"], **tools},
                },
                "resolvedDependencies": [*_dependencies(manifest, packages)],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"gguf-foundry": version}}},
        },
    }


def _dependencies(
    manifest: Mapping[str, Any], packages: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """The source's commit and every file of it, corpus, importance matrix, recipes, template patch, and packages."""
    source = manifest["source"]
    if "repo" in source:
        commit = source["revision"]
        yield {"uri": f"pkg:huggingface/{source['repo']}@{commit}", "digest": {"gitCommit": commit}}
    where = f"{source['repo']}@{source['revision']}" if "repo" in source else source["folder"]
    yield from (_named(f"{where}/{f['path']}", f["sha256"]) for f in source["files"])
    yield _named(f"calibration/{manifest['calibration']['set']}", manifest["calibration"]["sha256"])
    yield _named(manifest["imatrix"]["path"], manifest["imatrix"]["sha256"])
    yield _named(f"recipes/models/{manifest['model']}", hash_json(manifest["recipe"]))
    yield from (
        _named(f"recipes/variants/{v['name']}", hash_json(v["recipe"]))
        for v in manifest["variants"]
    )
    template = manifest["chat_template"]
    if template and template["patch"]:
        yield _named(f"recipes/templates/{template['patch']['name']}", hash_json(template["patch"]))
    yield from ({"uri": f"pkg:pypi/{name}@{version}"} for name, version in sorted(packages.items()))


def _named(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}
