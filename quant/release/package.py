"""Lay out a release: model files, texts, lists of digests, and last the manifest.

The folder has the same bytes for the same inputs. What may differ between two runs (times, paths,
the machine, the model's answers) goes into the run's record beside the release, never into it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.errors import raise_problems
from quant.core.files import Receipt
from quant.core.format import hash_text, to_pretty_json
from quant.core.store import Store
from quant.release.folder import CHECKSUMS, PROVENANCE
from quant.release.inputs import ReleaseInputs, make_manifest, place_files
from quant.release.manifest import MANIFEST, Manifest
from quant.release.ollama import find_params_problems, make_params, render_modelfile
from quant.release.provenance import PROJECT, SHAPING, make_statement
from quant.release.texts import render_texts


@dataclass(frozen=True)
class Release:
    """A finished release folder, in the store."""

    folder: Path
    name: str
    manifest: Manifest
    receipts: tuple[Receipt, ...]


def package_release(inputs: ReleaseInputs, store: Store) -> Release:
    """Return the release as a folder in the store. Model files are hard links to the stages' files.

    Raises:
        InputError: If the recipe has something for Ollama that it would refuse.
    """
    model = inputs.model
    raise_problems(find_params_problems(make_params(model)))
    render_modelfile(model, model.title)  # raises before any work if it cannot be written
    manifest, versions = make_manifest(inputs), read_package_versions()
    # Versions of packages and tools are no part of the manifest, but of the provenance.
    key = {**manifest.to_document(), "packages": versions, "tools": dict(inputs.tools)}

    def write(partial: Path) -> dict[str, Any]:
        for name, path in _list_model_files(inputs).items():
            files.link_or_copy(path, partial / name)
        for name, text in render_texts(inputs, manifest).items():
            files.write_text(partial / name, text)
        _write_lists(partial, manifest, versions, inputs.tools)
        return {"variants": len(inputs.variants)}

    result = store.run_once("package", key, write)
    return Release(result.folder, model.title, manifest, result.receipts)


def read_package_versions() -> dict[str, str]:
    """Return the version of this project and of each package that can change a release's bytes."""
    return {name: metadata.version(name) for name in (PROJECT, *SHAPING)}


def _list_model_files(inputs: ReleaseInputs) -> dict[str, Path]:
    """Return every GGUF of the release, by its path there."""
    placed = {
        name: path for variant, _ in inputs.variants for name, path in place_files(variant).items()
    }
    others = [f.path for f in (inputs.matrix, inputs.vision) if f]
    return placed | {path.name: path for path in others}


def _write_lists(
    partial: Path, manifest: Manifest, versions: Mapping[str, str], build: Mapping[str, Any]
) -> None:
    """Write provenance and SHA256SUMS, then the manifest: where it is, everything is."""
    known = manifest.known_digests  # else hundreds of gigabytes would be read once more
    paths = {
        p.relative_to(partial).as_posix(): p for p in sorted(partial.rglob("*")) if p.is_file()
    }
    sums = {name: known.get(name) or files.hash_file(path) for name, path in paths.items()}
    text = manifest.to_json()
    packages = {name: version for name, version in versions.items() if name != PROJECT}
    # Provenance covers the manifest, whose text is known already; SHA256SUMS covers provenance.
    subjects = {**sums, MANIFEST: hash_text(text)}
    statement = to_pretty_json(
        make_statement(manifest, subjects, packages, versions[PROJECT], build)
    )
    files.write_text(partial / PROVENANCE, statement)
    sums = dict(sorted({**sums, PROVENANCE: hash_text(statement)}.items()))
    files.write_text(partial / CHECKSUMS, "".join(f"{sha}  {name}\n" for name, sha in sums.items()))
    files.write_text(partial / MANIFEST, text)
