"""Models that the tests of llama.cpp's side share."""

import pytest

from quant.llama.model_file import ModelFile
from tests.models.conversion import convert
from tests.models.twins import TINY_GLM


@pytest.fixture(scope="package")
def tiny_glm(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """Return the trained tiny model as a BF16 file."""
    folder = tmp_path_factory.mktemp("tiny-glm")
    path = folder / "tiny-glm-BF16.gguf"
    convert([("text", TINY_GLM, path)], folder)
    return ModelFile.open(path)
