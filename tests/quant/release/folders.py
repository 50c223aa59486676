"""A sound release folder of one small file."""

import json
from pathlib import Path
from typing import Any

from quant.core.files import hash_file
from quant.core.format import hash_text
from quant.llama.gguf import read_header
from quant.release.package import CHECKSUMS, FORMAT, MANIFEST, PROVENANCE
from quant.release.provenance import make_statement

RECIPE: dict[str, Any] = {"name": "A", "summary": "", "file_type": "Q8_0", "rules": []}
TEMPLATE = "{{ messages }}"


def manifest_of(release: Path) -> dict[str, Any]:
    header = read_header(release / "a.gguf")
    tensors = {
        t.name: {"type": t.type.name, "sha256": header.tensor_digests()[t.name]}
        for t in header.tensors
    }
    listed = [{"path": "a.gguf", "bytes": (release / "a.gguf").stat().st_size}]
    text = header.metadata.get("tokenizer.chat_template")
    return {
        "format": FORMAT,
        "model": "a",
        "source": {"folder": "a", "files": []},
        "llama.cpp": "0.5.0",
        "recipe": {
            "card": {"license": "mit"},
            "imatrix": {},
            "max_shard_size": "50G",
            "pre_tokenizer": None,
        },
        "calibration": {"set": "embedded", "sha256": "0"},
        "imatrix": {"path": "imatrix.gguf", "sha256": "0"},
        "chat_template": {"sha256": hash_text(text), "patch": None}
        if isinstance(text, str)
        else None,
        "variants": [{"name": "A", "files": listed, "tensors": tensors, "recipe": RECIPE}],
    }


def lists(release: Path, **changes: Any) -> None:
    """Write the lists of a release as they have to be, but for what the manifest is to say otherwise."""
    manifest = manifest_of(release) | changes
    (release / MANIFEST).write_text(json.dumps(manifest))
    named = {
        p.name: hash_file(p) for p in release.iterdir() if p.name not in (CHECKSUMS, PROVENANCE)
    }
    (release / PROVENANCE).write_text(json.dumps(make_statement(manifest, named, {}, "0", {})))
    sums(release)


def sums(release: Path) -> None:
    names = [p.name for p in sorted(release.iterdir()) if p.name not in (CHECKSUMS, MANIFEST)]
    (release / CHECKSUMS).write_text("".join(f"{hash_file(release / n)}  {n}\n" for n in names))
