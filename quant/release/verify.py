"""Look at a release as a stranger would: every file there, whole, and what the manifest, the recipes and the card say of it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.core import files
from quant.core.format import hash_text
from quant.core.toml import parse_json_value
from quant.errors import InputError
from quant.llama.gguf import Header, read_headers
from quant.plan.plan import choose_type, match_rules
from quant.plan.recipe import Variant
from quant.quantize.shard import find_changed_tensors
from quant.release.folder import SIGNATURE, list_names, list_problems, read_checksums, read_manifest
from quant.release.package import CHECKSUMS, MANIFEST, PROVENANCE
from quant.release.sign import signature_problems


@dataclass(frozen=True)
class VerifyResult:
    """What was found in a release, and what nobody looked for."""

    problems: tuple[str, ...]
    """Everything that is not as the release's own lists say, in a line each."""
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    """What only other commands can tell."""


def verify_release(folder: Path, public_key: Path | None = None) -> VerifyResult:
    """Read every byte of a release and hold it against its lists, and its signature against the key of its maker.

    Raises InputError for a folder that is no release, and for a key that is none.
    """
    manifest = read_manifest(folder)
    problems = list(_file_problems(folder, read_checksums(folder)))
    if not problems:  # else what follows would only say the same once more
        problems += _variant_problems(folder, manifest)
        problems += _provenance_problems(folder)
        problems += _card_problems(folder, manifest)
        if public_key:
            problems += signature_problems(folder, _digests(folder), public_key)
    checked = [
        f"every byte against {CHECKSUMS}, every tensor against {MANIFEST}",
        "names, shards and types of every file against its recipe; its chat template",
        f"README.md against the files; {PROVENANCE} against the files",
    ]
    if public_key:
        checked.append(f"{SIGNATURE}: the files are signed by the key {public_key}")
    return VerifyResult(
        tuple(problems), tuple(checked), tuple(_unchecked(folder, manifest, public_key))
    )


def _digests(folder: Path) -> dict[str, str]:
    return read_checksums(folder) | {
        name: files.hash_file(folder / name) for name in (CHECKSUMS, MANIFEST)
    }


def _unchecked(folder: Path, manifest: Mapping[str, Any], public_key: Path | None) -> Iterator[str]:
    source = manifest["source"]
    of = (
        f"{source['repo']}@{source['revision']}"
        if "repo" in source
        else source.get("folder", "its source")
    )
    yield f"that the weights are those of {of}, quantised as it says: `quant rebuild {MANIFEST} -o DIR` makes them again"
    yield "that the model talks: `quant smoke FILE` asks it"
    if public_key is None and (folder / SIGNATURE).is_file():
        yield f"who made the release: {SIGNATURE} was not looked at; `--public-key` names the key of its maker"
    elif public_key is None:
        yield "who made the release: a checksum is no signature, and there is none"


def _file_problems(folder: Path, listed: Mapping[str, str]) -> Iterator[str]:
    here = list_names(folder)
    yield from list_problems(folder, here, listed)
    for name in sorted(here & listed.keys()):
        if (found := files.hash_file(folder / name)) != listed[name]:
            yield f"{folder / name}: expected sha256 {listed[name]}, found {found}"


def _variant_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Files that are what SHA256SUMS says, and yet hold something else than the manifest promises."""
    known = {f["path"] for v in manifest["variants"] for f in v["files"]}
    known |= {manifest[key]["path"] for key in ("imatrix", "vision") if manifest.get(key)}
    strangers = sorted({n for n in list_names(folder) if n.endswith(".gguf")} - known)
    yield from (f"{folder / name}: no variant of {MANIFEST} has this file" for name in strangers)
    for variant in manifest["variants"]:
        try:
            headers = read_headers(folder / variant["files"][0]["path"])
        except InputError as e:
            yield from e.problems
            continue
        yield from _set_problems(folder, variant, headers)
        yield from _tensor_problems(folder, variant, headers)
        yield from _template_problems(manifest, headers[0])


def _set_problems(
    folder: Path, variant: Mapping[str, Any], headers: Sequence[Header]
) -> Iterator[str]:
    found = [h.path.relative_to(folder).as_posix() for h in headers]
    expected = [f["path"] for f in variant["files"]]
    if found != expected:
        yield f"{variant['name']}: expected the shards {', '.join(expected)}, found {', '.join(found)}"
    for path, size in ((folder / f["path"], f["bytes"]) for f in variant["files"]):
        if path.is_file() and path.stat().st_size != size:
            yield f"{path}: expected {size} bytes, found {path.stat().st_size}"


def _tensor_problems(
    folder: Path, variant: Mapping[str, Any], headers: Sequence[Header]
) -> Iterator[str]:
    digests = {name: digest for h in headers for name, digest in h.tensor_digests().items()}
    tensors = [t for h in headers for t in h.tensors]
    types = {t.name: t.type.name for t in tensors}
    yield from find_changed_tensors(
        {n: t["sha256"] for n, t in variant["tensors"].items()}, digests, folder / variant["name"]
    )
    for name, tensor in variant["tensors"].items():
        if types.get(name) != tensor["type"]:
            yield f"{variant['name']}: tensor {name}: expected {tensor['type']}, found {types.get(name)}"
    recipe = parse_json_value(
        variant["recipe"], Variant, f"{folder / MANIFEST}: {variant['name']}: recipe"
    )
    if recipe.is_base:
        return
    deciding = match_rules(recipe, tensors)
    for t in tensors:
        n = deciding.get(t.name)
        if n is not None and (wanted := choose_type(recipe.rules[n], t)) != t.type:
            yield f"{variant['name']}: tensor {t.name}: rules[{n}] of its recipe says {wanted.name}, found {t.type.name}"


def _template_problems(manifest: Mapping[str, Any], header: Header) -> Iterator[str]:
    expected = (manifest.get("chat_template") or {}).get("sha256")
    text = header.metadata.get("tokenizer.chat_template")
    found = hash_text(text) if isinstance(text, str) else None
    if found != expected:
        yield f"{header.path}: tokenizer.chat_template: expected sha256 {expected}, found {found}"


def _provenance_problems(folder: Path) -> Iterator[str]:
    path = folder / PROVENANCE
    try:
        subjects = {
            s["name"]: s["digest"]["sha256"] for s in json.loads(path.read_text())["subject"]
        }
    except (OSError, ValueError, KeyError, TypeError) as e:
        yield f"{path}: expected an in-toto statement, found something else ({e!r})"
        return
    listed = {name: sha for name, sha in read_checksums(folder).items() if name != PROVENANCE}
    listed[MANIFEST] = files.hash_file(folder / MANIFEST)
    for name in sorted(subjects.keys() | listed.keys()):
        if subjects.get(name) != listed.get(name):
            yield f"{path}: {name}: expected sha256 {listed.get(name)}, found {subjects.get(name)}"


def _card_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """A card that leads nowhere, or leaves a file out."""
    path = folder / "README.md"
    if not path.is_file():
        yield f"{path}: missing; it is the model card"
        return
    text = path.read_text()
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    yield from (
        f"{path}: leads to {link}, which is not here"
        for link in sorted(links)
        if not (folder / link).exists()
    )
    for variant in manifest["variants"]:
        first = variant["files"][0]["path"]
        if not links & {first, variant["name"]}:
            yield f"{path}: says nothing of {first}"
    licence = manifest["recipe"]["card"]["license"]
    if f"\nlicense: {licence}\n" not in text:
        yield f"{path}: license: expected {licence}, as in {MANIFEST}"
