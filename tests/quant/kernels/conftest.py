"""The libraries that kernels are tried with."""

from pathlib import Path

import pytest

from quant import ggml
from quant.kernels.library import Native, load
from quant.toolchain import find


@pytest.fixture(scope="session")
def library() -> ggml.Library:
    return ggml.load(ggml.find(find().bin))


@pytest.fixture(scope="session")
def native() -> Native:
    found = load()
    if found.dll is None:
        pytest.skip(found.problem)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf-foundry" / "kernels"
