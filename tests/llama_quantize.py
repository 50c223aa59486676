"""llama-quantize, called with an explicit type for every tensor: the oracle of the quantizer."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from quant.core import files
from quant.llama.gguf import read_header
from quant.llama.toolchain import find_toolchain
from quant.plan.plan import is_quantizable
from quant.plan.sizes import MATRIX_NAME


def llama_quantize(
    base: Path,
    matrix: Path | None,
    types: Mapping[str, str],
    file_type: str,
    out: Path,
    *,
    threads: int = 2,
) -> Path:
    """Write ``out`` with these types.

    Its folder also gets the table of types, and the imatrix under the name that the file records.
    """
    tensors = read_header(base).by_name
    table = out.with_name(f"{out.name}.types")
    files.write_text(
        table, type_file({n: t for n, t in types.items() if is_quantizable(tensors[n])})
    )
    if matrix and not (out.parent / MATRIX_NAME).exists():
        files.link_or_copy(matrix, out.parent / MATRIX_NAME)
    options = ["--imatrix", MATRIX_NAME] if matrix else []
    command: list[str | Path] = [
        *options,
        "--tensor-type-file",
        table.name,
        base.resolve(),
        out.name,
        file_type,
        str(threads),
    ]
    process = subprocess.run(
        [find_toolchain().path("llama-quantize"), *command],
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return out


def type_file(types: Mapping[str, str]) -> str:
    """Return the ``--tensor-type-file`` that means exactly this table.

    llama-quantize searches every name with unanchored regular expressions and takes the first hit,
    so ``blk.1`` would also match ``blk.11``. Every name is escaped and anchored.
    """
    return "".join(
        f"^{re.escape(name)}$={ggml_type.lower()}\n" for name, ggml_type in types.items()
    )
