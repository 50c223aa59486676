"""docs/ggml-findings.md is true of the ggml that is installed. A failure means that the report is out of date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quant.llama import ggml
from quant.llama.toolchain import find_toolchain

REPORT = Path(__file__).parent.parent / "docs" / "ggml-findings.md"
SCRIPTS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```\n", REPORT.read_text(), re.DOTALL))

pytestmark = pytest.mark.tools


def run_script(name: str, folder: Path) -> tuple[int, str]:
    (folder / name).write_text(SCRIPTS[name])
    command = [sys.executable, name, str(ggml.find_library(find_toolchain().bin).resolve())]
    process = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"GGML_NO_BACKTRACE": "1"}
    )
    return process.returncode, process.stdout


def test_an_all_zero_sub_block_of_iq3_s_spoils_the_others(tmp_path: Path) -> None:
    _, out = run_script("shift.py", tmp_path)
    shifted, sound = (
        [float(e) for e in line.split("[")[1].strip(" ]").split()] for line in out.splitlines()
    )
    assert min(shifted) > 1 > 0.1 > max(sound)


def test_the_tables_of_the_iq2_types_take_seconds(tmp_path: Path) -> None:
    _, out = run_script("init.py", tmp_path)
    assert sum(float(line.split()[1]) for line in out.splitlines()) > 2


def test_large_weights_end_the_process(tmp_path: Path) -> None:
    code, out = run_script("abort.py", tmp_path)
    assert out == "1.0 written\n1000000000000.0 written\n"
    assert code < 0
