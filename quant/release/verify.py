"""Verify a release as a stranger would: files complete, manifest, recipes and card true."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.core import files
from quant.core.errors import InputError
from quant.core.format import hash_text
from quant.llama.gguf import Header, read_headers
from quant.plan.plan import choose_type, match_rules
from quant.quantize.shard import find_changed_tensors
from quant.release.folder import (
    CHECKSUMS,
    PROVENANCE,
    README,
    SIGNATURE,
    find_list_problems,
    hash_lists,
    list_names,
    read_checksums,
)
from quant.release.manifest import MANIFEST, Manifest, VariantRecord
from quant.release.sign import find_signature_problems


@dataclass(frozen=True)
class VerifyResult:
    """What verifying a release showed, and what it did not look at."""

    problems: tuple[str, ...]
    """Everything that is not as the release's own lists say, a line each."""
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    """What only other commands can tell."""


def verify_release(folder: Path, public_key: Path | None = None) -> VerifyResult:
    """Read every byte of a release and compare it with the release's lists.

    Args:
        folder: The release.
        public_key: The public half of its maker's key; then the signature is checked too.

    Returns:
        Every problem, what was checked, and what only other commands can check.

    Raises:
        InputError: For a folder that is no release, and for a key that is none.

    Example:
        >>> verify_release(Path("release/tiny-glm")).problems  # doctest: +SKIP
        ()
    """
    manifest = Manifest.read(folder / MANIFEST)
    problems = list(_find_file_problems(folder, read_checksums(folder)))
    if not problems:  # else the rest would only repeat them in other words
        problems += _find_variant_problems(folder, manifest)
        problems += _find_provenance_problems(folder)
        problems += _find_card_problems(folder, manifest)
        if public_key:
            problems += find_signature_problems(folder, hash_lists(folder), public_key)
    checked = [
        f"every byte against {CHECKSUMS}, every tensor against {MANIFEST}",
        "names, shards and types of every file against its recipe; its chat template",
        f"{README} against the files; {PROVENANCE} against the files",
    ]
    if public_key:
        checked.append(f"{SIGNATURE}: the files are signed by the key {public_key}")
    unchecked = tuple(_list_unchecked(folder, manifest, public_key))
    return VerifyResult(tuple(problems), tuple(checked), unchecked)


def _list_unchecked(folder: Path, manifest: Manifest, public_key: Path | None) -> Iterator[str]:
    yield (
        f"that the weights are those of {manifest.source.name}, quantized as the recipes say:"
        f" `quant rebuild {MANIFEST} -o DIR` builds them again"
    )
    yield "that the model answers: `quant smoke FILE` tests it"
    if public_key is None and (folder / SIGNATURE).is_file():
        yield (
            f"who made the release: {SIGNATURE} was not checked; name the maker's key with"
            " `--public-key`"
        )
    elif public_key is None:
        yield "who made the release: it has no signature, and a checksum is none"


def _find_file_problems(folder: Path, listed: Mapping[str, str]) -> Iterator[str]:
    present = list_names(folder)
    yield from find_list_problems(folder, present, listed)
    for name in sorted(present & listed.keys()):
        # Not by the digest cache: this check reads the bytes.
        if (actual := files.hash_file(folder / name)) != listed[name]:
            yield f"{folder / name}: expected sha256 {listed[name]}, found {actual}"


def _find_variant_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield where files match SHA256SUMS and not the manifest."""
    models = {n for n in list_names(folder) if n.endswith(".gguf")}
    for name in sorted(models - manifest.known_digests.keys()):
        yield f"{folder / name}: no variant of {MANIFEST} has this file"
    for variant in manifest.variants:
        try:
            headers = read_headers(folder / variant.files[0].path)
        except InputError as e:
            yield from e.problems
            continue
        yield from _find_shard_problems(folder, variant, headers)
        yield from _find_tensor_problems(folder, variant, headers)
        yield from _find_template_problems(manifest, headers[0])


def _find_shard_problems(
    folder: Path, variant: VariantRecord, headers: Sequence[Header]
) -> Iterator[str]:
    actual = [h.path.relative_to(folder).as_posix() for h in headers]
    expected = [f.path for f in variant.files]
    if actual != expected:
        yield (
            f"{variant.name}: expected the shards {', '.join(expected)}, found {', '.join(actual)}"
        )
    for path, size in ((folder / f.path, f.bytes) for f in variant.files):
        if path.is_file() and path.stat().st_size != size:
            yield f"{path}: expected {size} bytes, found {path.stat().st_size}"


def _find_tensor_problems(
    folder: Path, variant: VariantRecord, headers: Sequence[Header]
) -> Iterator[str]:
    """Yield tensors whose bytes or type differ from the manifest, or type from the recipe."""
    digests = {name: digest for h in headers for name, digest in h.hash_tensors().items()}
    tensors = [t for h in headers for t in h.tensors]
    types = {t.name: t.type.name for t in tensors}
    expected = {name: t.sha256 for name, t in variant.tensors.items()}
    yield from find_changed_tensors(expected, digests, folder / variant.name)
    for name, tensor in variant.tensors.items():
        if types.get(name) != tensor.type:
            yield (
                f"{variant.name}: tensor {name}: expected {tensor.type}, found {types.get(name)}"
            )
    if variant.is_base:
        return
    rules = variant.recipe.rules
    deciding = match_rules(variant.recipe, tensors)
    for t in tensors:
        n = deciding.get(t.name)
        # The coverage policy may store a tensor as a larger type; the manifest names the rule's.
        ruled = variant.raised.get(t.name, t.type.name)
        if n is not None and (wanted := choose_type(rules[n], t).name) != ruled:
            yield (
                f"{variant.name}: tensor {t.name}: rules[{n}] of its recipe says {wanted},"
                f" found {ruled}"
            )


def _find_template_problems(manifest: Manifest, header: Header) -> Iterator[str]:
    expected = manifest.chat_template.sha256 if manifest.chat_template else None
    text = header.metadata.get("tokenizer.chat_template")
    actual = hash_text(text) if isinstance(text, str) else None
    if actual != expected:
        yield f"{header.path}: tokenizer.chat_template: expected sha256 {expected}, found {actual}"


def _find_provenance_problems(folder: Path) -> Iterator[str]:
    path = folder / PROVENANCE
    try:
        subjects = {
            s["name"]: s["digest"]["sha256"] for s in json.loads(path.read_text())["subject"]
        }
    except (OSError, ValueError, KeyError, TypeError) as e:
        yield f"{path}: expected an in-toto statement, found something else ({e!r})"
        return
    listed = {name: sha for name, sha in read_checksums(folder).items() if name != PROVENANCE}
    # SHA256SUMS cannot list the manifest, which is written after it; provenance does.
    listed[MANIFEST] = files.hash_file(folder / MANIFEST)
    for name in sorted(subjects.keys() | listed.keys()):
        if subjects.get(name) != listed.get(name):
            yield f"{path}: {name}: expected sha256 {listed.get(name)}, found {subjects.get(name)}"


def _find_card_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield links of the card that lead nowhere, files that it leaves out, and another license."""
    path = folder / README
    if not path.is_file():
        yield f"{path}: missing; it is the model card"
        return
    text = path.read_text()
    # Relative links only: a check of a folder needs no network.
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    for link in sorted(links):
        if not (folder / link).exists():
            yield f"{path}: links to {link}, which is missing"
    for variant in manifest.variants:
        first = variant.files[0].path
        if not links & {first, variant.name}:
            yield f"{path}: expected a link to {first}, found none"
    name = manifest.recipe.card.license
    if f"\nlicense: {name}\n" not in text:
        yield f"{path}: license: expected {name}, as in {MANIFEST}"
