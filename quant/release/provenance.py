"""How a release came to be: an in-toto statement with a SLSA v1 predicate. Pure.

https://slsa.dev/spec/v1.0/provenance. The statement holds only what is the same whenever the same
release is made. Times, hosts and paths are in the run's record beside the release.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from quant.core.format import hash_json
from quant.release.manifest import Manifest, to_plain

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILDER = "urn:gguf-foundry"
PROJECT = "gguf-foundry"
SHAPING = tuple(
    "gguf huggingface-hub jinja2 llama-cpp-python numpy safetensors sentencepiece tokenizers torch"
    " transformers".split()
)
"""Packages whose version can change a byte of a release."""


def make_statement(
    manifest: Manifest,
    subjects: Mapping[str, str],
    packages: Mapping[str, str],
    version: str,
    build: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the statement about the files of a release.

    Args:
        manifest: The manifest of the release.
        subjects: The sha256 of every file, by name.
        packages: The version of every package of ``SHAPING``.
        version: The version of this project.
        build: How llama.cpp was built, as :attr:`quant.llama.toolchain.Toolchain.build_info` has
            it.
    """
    recipe = manifest.recipe
    source = {k: v for k, v in to_plain(manifest.source).items() if k != "files"}
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
                    "model": manifest.model,
                    "variants": [v.name for v in manifest.variants],
                    "source": source,
                },
                "internalParameters": {
                    "imatrix": asdict(recipe.imatrix),
                    "max_shard_size": recipe.max_shard_size,
                    "pre_tokenizer": recipe.pre_tokenizer,
                    "llama.cpp": {"version": manifest.llama_cpp, **build},
                },
                "resolvedDependencies": [*_list_dependencies(manifest, packages)],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {PROJECT: version}}},
        },
    }


def read_versions(statement: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a statement says of the versions that made a release.

    Returns:
        Version by package, this project among them, and each setting of llama.cpp's build. Empty
        for JSON that is no such statement.
    """
    try:
        predicate = statement["predicate"]
        definition = predicate["buildDefinition"]
        uris = [d.get("uri", "") for d in definition["resolvedDependencies"]]
        packages = [u.removeprefix("pkg:pypi/") for u in uris if u.startswith("pkg:pypi/")]
        build = definition["internalParameters"]["llama.cpp"]
        settings = build if isinstance(build, dict) else {}
        return (
            {name: version for name, _, version in (p.partition("@") for p in packages)}
            | dict(predicate["runDetails"]["builder"]["version"])
            | {f"llama.cpp's {k}": v for k, v in settings.items() if k != "version"}
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _list_dependencies(manifest: Manifest, packages: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield source, calibration text, imatrix, recipes, template patch and packages."""
    source, template = manifest.source, manifest.chat_template
    if source.repo:
        # A package URL (purl-spec, type huggingface): the version is the commit. gitCommit is
        # in-toto's name for its digest.
        uri = f"pkg:huggingface/{source.repo}@{source.revision}"
        yield {"uri": uri, "digest": {"gitCommit": source.revision}}
    yield from (_name_digest(f"{source.name}/{f.path}", f.sha256) for f in source.files)
    yield _name_digest(f"calibration/{manifest.calibration.set}", manifest.calibration.sha256)
    yield _name_digest(manifest.imatrix.path, manifest.imatrix.sha256)
    yield _name_digest(f"recipes/models/{manifest.model}", hash_json(asdict(manifest.recipe)))
    for v in manifest.variants:
        yield _name_digest(f"recipes/variants/{v.name}", hash_json(asdict(v.recipe)))
    if template and (patch := template.patch):
        yield _name_digest(f"recipes/templates/{patch.name}", hash_json(asdict(patch)))
    yield from ({"uri": f"pkg:pypi/{name}@{version}"} for name, version in sorted(packages.items()))


def _name_digest(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}
