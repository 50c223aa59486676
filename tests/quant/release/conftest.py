"""A release that verifies."""

from pathlib import Path

import pytest

from tests.gguf_files import write as write_gguf
from tests.quant.release.folders import write_lists


@pytest.fixture
def release(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "a.gguf")
    (tmp_path / "params").write_text("{}")
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\n---\n# a\n[A](a.gguf) [hub](https://x.example/y)\n"
    )
    write_lists(tmp_path)
    return tmp_path
