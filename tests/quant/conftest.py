"""A hub for the client in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from quant.build import apply_template_patch, pull_locked
from quant.core.store import Store
from quant.job import load_pinned_model
from quant.llama import toolchain
from quant.llama.convert import convert_checkpoint
from quant.release.metadata import make_file_metadata
from tests import hub as hubs
from tests.hub import Hub
from tests.models.corpus import code_pieces

TOKEN = "hf_ThisIsTheTokenOfSomebody"


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process speaks to; it is patient without waiting."""
    from huggingface_hub import constants

    with hubs.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr("time.sleep", lambda _: None)
        running.tokens[TOKEN] = "write"
        running.part_bytes = 2000
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The tiny model, a file of it in Q4_0, and a text that it can read."""
    folder = tmp_path_factory.mktemp("evaluate")
    store, tools = Store(folder / "store"), toolchain.find_toolchain()
    model, recipe, locked = load_pinned_model("tiny-glm")
    checkpoint = pull_locked(model, recipe, locked, store)
    template = apply_template_patch(model.template, checkpoint)
    base = convert_checkpoint(
        checkpoint, template.text if template else None, make_file_metadata(model), tools, store
    ).path
    tools.run("llama-quantize", [base, "q.gguf", "Q4_0", "1"], cwd=folder, log=folder / "log")
    pieces = code_pieces(9)
    text = folder / "code.txt"
    text.write_text("".join(next(pieces) for _ in range(9)))
    return base, folder / "q.gguf", text
