"""Convert a checkpoint to one BF16 GGUF with llama.cpp's own ``conversion`` package, the chat template already patched.

The package runs in a process of its own: it brings its own copy of gguf-py, and it may not see a token or the network.
It reads a folder made for it, in which the patched template stands and the rest are links to the checkpoint.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant import files, toolchain
from quant.files import Receipt
from quant.header import Header, read_header
from quant.recipe import Model
from quant.source import Checkpoint
from quant.store import Store
from quant.template import ChatTemplate

REPLACED = ("chat_template.jinja", "tokenizer_config.json", "README.md")


@dataclass(frozen=True)
class Base:
    """The BF16 file that every variant is made of."""

    path: Path
    receipt: Receipt

    @property
    def header(self) -> Header:
        """Its metadata and tensors."""
        return read_header(self.path)


def convert(
    checkpoint: Checkpoint, template: ChatTemplate | None, model: Model, tools: toolchain.Toolchain, store: Store
) -> Base:
    """The checkpoint as one BF16 GGUF. Raises ToolError with the converter's last words when it gives up."""
    inputs = {
        "checkpoint": [asdict(r) for r in checkpoint.receipts],
        "template": template.sha256 if template else None,
        "metadata": _metadata(model),
        "card": _card(model),
        "title": model.title,
        "pre_tokenizer": model.pre_tokenizer,
        "llama.cpp": str(tools.version),
    }
    name = f"{model.title}-BF16.gguf"
    done = store.once("convert", inputs, lambda partial: _convert(checkpoint, template, model, partial, name))
    return Base(done.path(name), done.receipt(name))


def _convert(
    checkpoint: Checkpoint, template: ChatTemplate | None, model: Model, partial: Path, name: str
) -> dict[str, Any]:
    folder = _lay_out(checkpoint, template, model, partial / "hf" / model.title)
    files.write_text(partial / "metadata.json", files.pretty(_metadata(model)))
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "quant.converter",
        folder,
        partial / name,
        partial / "metadata.json",
    ]
    if model.pre_tokenizer:
        command.append(model.pre_tokenizer)
    toolchain.run(command, cwd=partial, log=partial / "log", env=_quiet_environment())
    header = read_header(partial / name)
    files.remove(partial / "hf")
    return {"architecture": header.architecture, "tensors": len(header.tensors), "parameters": header.elements}


def _lay_out(checkpoint: Checkpoint, template: ChatTemplate | None, model: Model, folder: Path) -> Path:
    """A folder that shows the converter the checkpoint with the patched template, under a name that may be published."""
    folder.mkdir(parents=True)
    for receipt in checkpoint.receipts:
        if receipt.path not in REPLACED and "/" not in receipt.path:
            (folder / receipt.path).symlink_to(checkpoint.folder / receipt.path)
    config = checkpoint.folder / "tokenizer_config.json"
    if config.exists():
        # The converter prefers this key over the file beside it; without the key there is one template and no doubt.
        settings = {k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}
        files.write_text(folder / "tokenizer_config.json", files.pretty(settings))
    if template:
        files.write_text(folder / "chat_template.jinja", template.text)
    files.write_text(folder / "README.md", _card(model))
    return folder


def _card(model: Model) -> str:
    """Front matter from which the converter takes licence, languages and base model."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=model.card.license, language=list(model.card.languages), base_model=model.card.base_model
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _metadata(model: Model) -> Mapping[str, Any]:
    """What the file says of the model, instead of what the converter would guess from a folder's name."""
    sampling = model.sampling
    said = {
        "general.name": model.title,
        "general.basename": model.title,
        "general.description": model.card.description or None,
        "general.sampling.temp": sampling.temperature,
        "general.sampling.top_p": sampling.top_p,
        "general.sampling.top_k": sampling.top_k,
        "general.sampling.min_p": sampling.min_p,
        "general.sampling.penalty_repeat": sampling.repeat_penalty,
    }
    return {key: value for key, value in said.items() if value is not None}


def _quiet_environment() -> dict[str, str]:
    """The converter may load a tokenizer through transformers; it gets no token and no network to do it with."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
