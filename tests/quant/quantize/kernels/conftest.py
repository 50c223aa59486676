"""The libraries that kernels are tried with."""

from pathlib import Path

import pytest

from quant.llama import ggml
from quant.llama.toolchain import find_toolchain
from quant.quantize.kernels.library import NativeLibrary, load_library


@pytest.fixture(scope="session")
def library() -> ggml.Library:
    return ggml.load_ggml(ggml.find_library(find_toolchain().bin))


@pytest.fixture(scope="session")
def native() -> NativeLibrary:
    found = load_library()
    if found.dll is None:
        pytest.skip(found.problem)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf-foundry" / "kernels"
