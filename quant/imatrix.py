"""Compute the importance matrix with llama-imatrix, and say which tensors and experts it knows.

For every matrix the file holds two tensors: ``NAME.in_sum2``, the sums of the squared inputs of each column, and
``NAME.counts``, the tokens that were summed, both per expert (llama.cpp, tools/imatrix).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant import files
from quant.calibrate import CalibrationText
from quant.convert import Base
from quant.errors import CheckFailed, InputError
from quant.files import Receipt
from quant.footprint import TEXT_NAME
from quant.header import read_header
from quant.recipe import Imatrix, Model
from quant.store import Store
from quant.toolchain import Toolchain

BATCH_TOKENS = 512
"""Fixed, because the sums are rounded in the order of the batches."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """How much each input of each matrix matters, and what was never seen."""

    path: Path
    receipt: Receipt
    unvisited: Mapping[str, int]
    """Experts without a single token, for every matrix that the file knows; 0 where all were visited."""

    def covers(self, tensor: str) -> bool:
        """Whether there is data for that tensor."""
        return tensor in self.unvisited


def imatrix(base: Base, text: CalibrationText, model: Model, tools: Toolchain, store: Store) -> ImportanceMatrix:
    """The importance matrix of a BF16 file over a calibration text. Raises ToolError, or CheckFailed for an empty one."""
    inputs = {
        "base": asdict(base.receipt),
        "text": text.receipt.sha256,
        "context": model.imatrix.context,
        "chunks": model.imatrix.chunks,
        "llama.cpp": str(tools.version),
    }
    name = f"imatrix_{model.title}.gguf"
    settings = model.imatrix
    done = store.once("imatrix", inputs, lambda partial: compute(base.path, text.path, settings, tools, partial / name))
    return ImportanceMatrix(done.path(name), done.receipt(name), done.facts["unvisited"])


def compute(base: Path, text: Path, settings: Imatrix, tools: Toolchain, out: Path) -> dict[str, Any]:
    """Write the importance matrix of a GGUF over a text at ``out``, whose folder belongs to this work."""
    # The name of the text is written into the file, so it is called by a name that may be published.
    files.share(text, out.parent / TEXT_NAME)
    chunks = ["--chunks", str(settings.chunks)] if settings.chunks else []
    tools.run(
        "llama-imatrix",
        ["-m", base, "-f", TEXT_NAME, "-o", out.name, "--parse-special", "--no-ppl", "-c", str(settings.context),
         "-b", str(BATCH_TOKENS), "-ub", str(BATCH_TOKENS), *chunks],
        cwd=out.parent, log=out.parent / "log",
    )  # fmt: skip
    files.remove(out.parent / TEXT_NAME)
    if not (unvisited := unvisited_experts(out)):
        raise CheckFailed(f"{out.name}: expected data for the model's matrices, found none; is the text too short?")
    return {"matrices": len(unvisited), "unvisited": unvisited}


def read(path: Path) -> ImportanceMatrix:
    """An importance matrix that was computed before. Raises InputError for a file that holds none."""
    if not (unvisited := unvisited_experts(path)):
        raise InputError(f"{path}: expected an importance matrix (tensors NAME.counts), found none")
    return ImportanceMatrix(path, files.receipt(path, path.parent), unvisited)


def unvisited_experts(path: Path) -> dict[str, int]:
    """For every matrix of an imatrix file, how many of its experts saw no token. Raises InputError for another file."""
    import numpy as np

    header = read_header(path)
    unvisited = {}
    for tensor in header.tensors:
        if tensor.name.endswith(".counts"):
            counts = np.fromfile(path, "<f4", tensor.elements, offset=header.data_start + tensor.offset)
            unvisited[tensor.name.removesuffix(".counts")] = int((counts == 0).sum())
    return dict(sorted(unvisited.items()))
