"""Many conversions in one process: the converter's imports take longer than the conversion of a twin."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from quant.llama import toolchain

CONVERT = """
import json, sys
from pathlib import Path
from quant.llama.converter import write_gguf
for part, folder, out, metadata in json.load(sys.stdin):
    write_gguf(part, Path(folder), Path(out), Path(metadata), "glm4")
"""


def convert(jobs: Iterable[tuple[str, Path, Path]], scratch: Path) -> None:
    """Write many GGUF files: the part (text or vision), the checkpoint's folder, and the file of each."""
    metadata = scratch / "metadata.json"
    metadata.write_text("{}")
    told = json.dumps([[part, str(folder), str(out), str(metadata)] for part, folder, out in jobs])
    done = subprocess.run(
        [sys.executable, "-c", CONVERT], input=told, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def dry_run(base: Path, *options: str | Path) -> dict[str, str]:
    """The types that llama-quantize says it would write, by tensor, in its order."""
    command = [toolchain.find_toolchain().path("llama-quantize"), "--dry-run", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=base.parent)
    line = re.compile(
        r"^\[ *\d+/ *\d+\] +(\S+) .*?type = +(\w+)(?:.*-> .*\((\w+)\))?", re.MULTILINE
    )
    return {
        name: (new or old).upper() for name, old, new in line.findall(done.stdout + done.stderr)
    }
