"""The commands that only read: ``quant inspect`` a GGUF file, ``quant doctor`` the machine."""

import json
import math
from pathlib import Path
from typing import Any

import click

from quant.cli import tables
from quant.cli.options import FILE, json_option, quant, shorten, tools_option


@quant.command(short_help="Show metadata and tensors of a GGUF.")
@click.argument("gguf", type=FILE)
@json_option
def inspect(gguf: Path, as_json: bool) -> None:
    """Show metadata and tensors of a GGUF file, or of a split one by its first shard."""
    from quant.core.format import human_bytes
    from quant.llama.gguf import read_headers

    headers = read_headers(gguf)
    tensors = [t for h in headers for t in h.tensors]
    short = {k: _short(v) for k, v in headers[0].metadata.items()}
    if as_json:
        rows: list[dict[str, Any]] = [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.bytes}
            for t in tensors
        ]
        return click.echo(
            json.dumps({"file": gguf.name, "metadata": short, "tensors": rows}, ensure_ascii=False)
        )
    tables.print_table(("key", "value"), [(k, shorten(v)) for k, v in short.items()])
    tables.print_table(
        ("tensor", "type", ">shape", ">bytes"),
        [(t.name, t.type.name, " x ".join(map(str, t.shape)), f"{t.bytes:,}") for t in tensors],
    )
    elements = sum(t.elements for t in tensors)
    size = sum(t.bytes for t in tensors)
    # A file with a vocabulary only has no tensors.
    bpw = 8 * size / max(elements, 1)
    click.echo(
        f"{len(tensors)} tensors, {elements:,} weights, {human_bytes(size)},"
        f" {bpw:.2f} bits per weight"
    )
    return None


def _short(value: Any) -> Any:
    """Return a metadata value for JSON."""
    # A vocabulary has hundreds of thousands of entries.
    if isinstance(value, list):
        return f"[{len(value)} values]"
    # JSON has no NaN and no infinity, and Python's json would write them all the same.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@quant.command(short_help="Show what is installed and what is missing.")
@tools_option
def doctor(llama_cpp: Path | None) -> None:
    """Show what is needed and installed, and how to get the rest; exit 2 if any is missing."""
    from quant.cli.doctor import examine_machine

    findings = examine_machine(llama_cpp)
    tables.print_table(
        ("", "what", "version", "where, or how to get it"), [f.row for f in findings]
    )
    # 2, as for any other error of the machine.
    raise SystemExit(0 if all(f.ok for f in findings) else 2)
