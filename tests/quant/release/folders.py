"""Release folders for tests, of one small file or of none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.core.files import Receipt, hash_file
from quant.core.format import hash_text
from quant.llama.gguf import read_header
from quant.plan.recipe import Variant
from quant.release.folder import CHECKSUMS, PROVENANCE
from quant.release.manifest import MANIFEST, Manifest, TemplateRecord, TensorRecord, VariantRecord
from quant.release.provenance import make_statement
from tests.quant.release.manifests import TINY, make_manifest, make_variant

RECIPE = Variant("A", "For tests.", "Q8_0")
TEMPLATE = "{{ messages }}"


def with_license(name: str) -> Any:
    """Return a model recipe with that license."""
    return replace(TINY, card=replace(TINY.card, license=name))


def describe_variant(release: Path) -> VariantRecord:
    """Return the record of the variant ``a.gguf``, as that file is."""
    header = read_header(release / "a.gguf")
    digests = header.hash_tensors()
    return make_variant(
        "A",
        recipe=RECIPE,
        files=(Receipt("a.gguf", "0" * 64, (release / "a.gguf").stat().st_size),),
        tensors={
            t.name: TensorRecord(type=t.type.name, sha256=digests[t.name]) for t in header.tensors
        },
    )


def describe_release(release: Path) -> Manifest:
    """Return the manifest of a release folder with the one file ``a.gguf``."""
    text = read_header(release / "a.gguf").metadata.get("tokenizer.chat_template")
    template = None
    if isinstance(text, str):
        digest = hash_text(text)
        template = TemplateRecord(original_sha256=digest, sha256=digest, patch=None)
    return make_manifest(
        recipe=with_license("mit"),
        chat_template=template,
        variants=(describe_variant(release),),
    )


def write_lists(release: Path, **changes: Any) -> None:
    """Write the lists of a release as they have to be, with changes to its manifest."""
    manifest = replace(describe_release(release), **changes)
    (release / MANIFEST).write_text(manifest.to_json())
    named = {
        p.name: hash_file(p) for p in release.iterdir() if p.name not in (CHECKSUMS, PROVENANCE)
    }
    (release / PROVENANCE).write_text(json.dumps(make_statement(manifest, named, {}, "0", {})))
    write_checksums(release)


def write_checksums(release: Path) -> None:
    """Write SHA256SUMS of the files that are there."""
    names = [p.name for p in sorted(release.iterdir()) if p.name not in (CHECKSUMS, MANIFEST)]
    (release / CHECKSUMS).write_text("".join(f"{hash_file(release / n)}  {n}\n" for n in names))
