"""Convert a checkpoint to one BF16 GGUF with llama.cpp's own ``conversion`` package.

A model with vision has a second file: its vision encoder and projector in F16 (mmproj), which goes
with every variant.

The package runs in a child program, for two reasons: it brings its own copy of gguf-py, and it may
see neither a token nor the network. It reads a folder that is laid out for it, with the patched
chat template and links to the checkpoint's other files.
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
from quant.llama.gguf import read_header
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain

REPLACED = ("chat_template.jinja", "tokenizer_config.json", "README.md")
"""Files of the checkpoint that the converter gets in another form, or not at all."""


@dataclass(frozen=True)
class FileMetadata:
    """What a file says of its model, where the converter would guess from the folder's name."""

    title: str
    metadata: Mapping[str, Any]
    """GGUF keys and their values."""
    front_matter: str = ""
    """YAML of a model card, from which the converter takes license, languages and base model."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the pre-tokenizer, if the converter does not know its hash."""


def convert_checkpoint(
    checkpoint: Checkpoint,
    template: str | None,
    metadata: FileMetadata,
    tools: Toolchain,
    store: Store,
) -> ModelFile:
    """Convert a checkpoint to one BF16 GGUF, or find it in the store.

    Args:
        checkpoint: The weights, with the digests of all files.
        template: The chat template that the file gets. None leaves it without.
        metadata: What the file says of the model.
        tools: Their version is part of the store's key.
        store: Where the file is kept.

    Raises:
        ToolError: The converter fails. The error quotes the end of its log.
    """
    inputs = {
        "template": hash_text(template) if template is not None else None,
        **_describe_inputs(checkpoint, metadata, tools),
    }
    name = f"{metadata.title}-BF16.gguf"
    result = store.run_once(
        "convert",
        inputs,
        lambda partial: write_base(checkpoint, template, metadata, partial / name),
    )
    return ModelFile((result.path(name),), (result.receipt(name),))


def convert_vision(
    checkpoint: Checkpoint, metadata: FileMetadata, tools: Toolchain, store: Store
) -> ModelFile | None:
    """Convert the vision part to one F16 GGUF, or find it in the store.

    Takes what :func:`convert_checkpoint` takes, and raises the same.

    Returns:
        The mmproj file, or None for a model without vision.
    """
    if not has_vision(checkpoint):
        return None
    name = f"mmproj-{metadata.title}-F16.gguf"
    result = store.run_once(
        "convert-vision",
        _describe_inputs(checkpoint, metadata, tools),
        lambda partial: write_vision(checkpoint, metadata, partial / name),
    )
    return ModelFile((result.path(name),), (result.receipt(name),))


def has_vision(checkpoint: Checkpoint) -> bool:
    """Whether the model has a vision part."""
    return bool(checkpoint.config.get("vision_config"))


def write_base(
    checkpoint: Checkpoint, template: str | None, metadata: FileMetadata, out: Path
) -> dict[str, Any]:
    """Write the BF16 GGUF at ``out``, in a folder of its own.

    Returns:
        Architecture, number of tensors and number of parameters of the file.

    Raises:
        ToolError: The converter fails.
    """
    return _write("text", checkpoint, template, metadata, out)


def write_vision(checkpoint: Checkpoint, metadata: FileMetadata, out: Path) -> dict[str, Any]:
    """Write the vision part at ``out`` in F16, as mmproj files are published.

    Otherwise as :func:`write_base`.
    """
    # Sampling defaults and a pre-tokenizer are the text part's.
    keys = {k: v for k, v in metadata.metadata.items() if not k.startswith("general.sampling.")}
    own = replace(metadata, metadata=keys, pre_tokenizer=None)
    return _write("vision", checkpoint, None, own, out)


def _describe_inputs(
    checkpoint: Checkpoint, metadata: FileMetadata, tools: Toolchain
) -> dict[str, Any]:
    """Return what a conversion depends on, under the store's keys (renaming one redoes work)."""
    return {
        "checkpoint": [asdict(r) for r in checkpoint.receipts],
        "words": asdict(metadata),
        "llama.cpp": str(tools.version),
    }


def _write(
    part: str, checkpoint: Checkpoint, template: str | None, metadata: FileMetadata, out: Path
) -> dict[str, Any]:
    folder = _lay_out_checkpoint(checkpoint, template, metadata, out.parent / "hf" / metadata.title)
    keys = out.parent / "metadata.json"
    files.write_text(keys, to_pretty_json(metadata.metadata))
    job = {
        "part": part,
        "checkpoint": folder,
        "out": out,
        "metadata": keys,
        "pre_tokenizer": metadata.pre_tokenizer,
    }
    child.run_child(
        "quant.llama.converter",
        job,
        folder=out.parent,
        name="the converter",
        env=_create_environment(),
    )
    # The store takes every regular file that is left in the folder as a result.
    files.remove(out.parent / "hf")
    header = read_header(out)
    return {
        "architecture": header.architecture,
        "tensors": len(header.tensors),
        "parameters": header.elements,
    }


def _lay_out_checkpoint(
    checkpoint: Checkpoint, template: str | None, metadata: FileMetadata, folder: Path
) -> Path:
    """Fill a folder with the checkpoint as the converter shall see it.

    The folder's name is the model's title, because the converter may write it into the file.
    """
    folder.mkdir(parents=True)
    for receipt in checkpoint.receipts:
        # Not the subfolders: of these the converter reads only additional_chat_templates, and the
        # template is the given one. Links, because the weights may have hundreds of gigabytes.
        if receipt.path not in REPLACED and "/" not in receipt.path:
            (folder / receipt.path).symlink_to(checkpoint.folder / receipt.path)
    config = checkpoint.folder / "tokenizer_config.json"
    if config.exists():
        # The converter prefers this file's chat_template over chat_template.jinja.
        settings = {k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}
        files.write_text(folder / "tokenizer_config.json", to_pretty_json(settings))
    if template is not None:
        files.write_text(folder / "chat_template.jinja", template)
    if metadata.front_matter:
        files.write_text(folder / "README.md", f"---\n{metadata.front_matter}\n---\n")
    return folder


def _create_environment() -> dict[str, str]:
    """Return this environment without a token and the network.

    The converter may load a tokenizer through transformers, which would use both.
    """
    tokens = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return {k: v for k, v in os.environ.items() if k not in tokens} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
