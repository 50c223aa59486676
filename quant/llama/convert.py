"""Convert a checkpoint to one BF16 GGUF with llama.cpp's own ``conversion`` package, the chat template already patched.

A model that sees has a second file: its vision part in F16 (mmproj), which goes with every variant.

The package runs in a process of its own: it brings its own copy of gguf-py, and it may not see a token or the network.
It reads a folder made for it, in which the patched template stands and the rest are links to the checkpoint.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quant.core import child, files
from quant.core.format import hash_text, to_pretty_json
from quant.core.store import Store
from quant.hub.checkpoint import Checkpoint
from quant.llama import toolchain
from quant.llama.gguf import read_header
from quant.llama.model_file import ModelFile

REPLACED = ("chat_template.jinja", "tokenizer_config.json", "README.md")


@dataclass(frozen=True)
class FileMetadata:
    """What a file says of its model, instead of what the converter would guess from a folder's name."""

    title: str
    metadata: Mapping[str, Any]
    """Keys of GGUF and their values."""
    front_matter: str = ""
    """YAML from which the converter takes licence, languages and base model."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the pre-tokenizer, where the converter does not know its hash."""


def convert_checkpoint(
    checkpoint: Checkpoint,
    template: str | None,
    words: FileMetadata,
    tools: toolchain.Toolchain,
    store: Store,
) -> ModelFile:
    """The checkpoint as one BF16 GGUF. Raises ToolError with the converter's last words when it gives up."""
    inputs = {
        "checkpoint": [asdict(r) for r in checkpoint.receipts],
        "template": hash_text(template) if template is not None else None,
        "words": asdict(words),
        "llama.cpp": str(tools.version),
    }
    name = f"{words.title}-BF16.gguf"
    done = store.run_once(
        "convert", inputs, lambda partial: write_base(checkpoint, template, words, partial / name)
    )
    return ModelFile((done.path(name),), (done.receipt(name),))


def convert_vision(
    checkpoint: Checkpoint, words: FileMetadata, tools: toolchain.Toolchain, store: Store
) -> ModelFile | None:
    """The vision part as one F16 GGUF; none for a model that only reads. Raises ToolError as :func:`convert` does."""
    if not has_vision(checkpoint):
        return None
    inputs = {
        "checkpoint": [asdict(r) for r in checkpoint.receipts],
        "words": asdict(words),
        "llama.cpp": str(tools.version),
    }
    name = f"mmproj-{words.title}-F16.gguf"
    done = store.run_once(
        "convert-vision", inputs, lambda partial: write_vision(checkpoint, words, partial / name)
    )
    return ModelFile((done.path(name),), (done.receipt(name),))


def has_vision(checkpoint: Checkpoint) -> bool:
    """Whether the model has a vision part."""
    return bool(checkpoint.config.get("vision_config"))


def write_base(
    checkpoint: Checkpoint, template: str | None, words: FileMetadata, out: Path
) -> dict[str, Any]:
    """Write the BF16 GGUF at ``out``; the folder that it is in belongs to this work. Returns what the file holds."""
    return _write("text", checkpoint, template, words, out)


def write_vision(checkpoint: Checkpoint, words: FileMetadata, out: Path) -> dict[str, Any]:
    """Write the vision part in F16 at ``out``, as mmproj files are published; otherwise as :func:`write_base`."""
    metadata = {k: v for k, v in words.metadata.items() if not k.startswith("general.sampling.")}
    return _write(
        "vision", checkpoint, None, replace(words, metadata=metadata, pre_tokenizer=None), out
    )


def _write(
    part: str, checkpoint: Checkpoint, template: str | None, words: FileMetadata, out: Path
) -> dict[str, Any]:
    folder = _lay_out(checkpoint, template, words, out.parent / "hf" / words.title)
    metadata = out.parent / "metadata.json"
    files.write_text(metadata, to_pretty_json(words.metadata))
    job = {
        "part": part,
        "checkpoint": folder,
        "out": out,
        "metadata": metadata,
        "pre_tokenizer": words.pre_tokenizer,
    }
    child.run_child(
        "quant.llama.converter",
        job,
        folder=out.parent,
        name="the converter",
        env=_quiet_environment(),
    )
    files.remove(out.parent / "hf")
    header = read_header(out)
    return {
        "architecture": header.architecture,
        "tensors": len(header.tensors),
        "parameters": header.elements,
    }


def _lay_out(
    checkpoint: Checkpoint, template: str | None, words: FileMetadata, folder: Path
) -> Path:
    """A folder that shows the converter the checkpoint with the patched template, under a name that may be published."""
    folder.mkdir(parents=True)
    for receipt in checkpoint.receipts:
        if receipt.path not in REPLACED and "/" not in receipt.path:
            (folder / receipt.path).symlink_to(checkpoint.folder / receipt.path)
    config = checkpoint.folder / "tokenizer_config.json"
    if config.exists():
        # The converter prefers this key over the file beside it; without the key there is one template and no doubt.
        settings = {k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}
        files.write_text(folder / "tokenizer_config.json", to_pretty_json(settings))
    if template is not None:
        files.write_text(folder / "chat_template.jinja", template)
    if words.front_matter:
        files.write_text(folder / "README.md", f"---\n{words.front_matter}\n---\n")
    return folder


def _quiet_environment() -> dict[str, str]:
    """The converter may load a tokenizer through transformers; it gets no token and no network to do it with."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
