"""The libraries that the kernels are tested with."""

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
    native = load_library()
    if native.dll is None:
        pytest.skip(native.problem)
    return native


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own, and return its path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf-foundry" / "kernels"
