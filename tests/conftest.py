"""Fixtures that many tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from quant.llama.toolchain import TOOLS, Toolchain

settings.register_profile("unit", deadline=None)  # a busy machine is no failure
settings.load_profile("unit")

VERSION = "version: 0.5.0-dev (build 1, commit 0c1e570)"


@pytest.fixture
def fake_tools(tmp_path: Path) -> Callable[..., Toolchain]:
    """A folder of llama.cpp's tools as small shell scripts: ``fake_tools(llama_quantize="exit 3", version="…")``.

    Tools that are not given succeed and say nothing; ``missing`` names those that are not there.
    """

    def make(version: str = VERSION, missing: tuple[str, ...] = (), **scripts: str) -> Toolchain:
        folder = tmp_path / "fake-bin"
        folder.mkdir(exist_ok=True)
        for tool in TOOLS:
            if tool in missing:
                continue
            body = scripts.get(tool.replace("-", "_"), "exit 0")
            if tool == "llama-server" and "llama_server" not in scripts:
                body = f"echo '{version}'"
            path = folder / tool
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        return Toolchain(folder)

    return make


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out modules whose every test is deselected by a marker: some import torch or Prefect."""
    if collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    for marker in ("tools", "prefect"):
        whole = f"\npytestmark = pytest.mark.{marker}\n" in text
        if whole and f"not {marker}" in config.getoption("markexpr"):
            return True
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the tables of tests/golden anew"
    )
