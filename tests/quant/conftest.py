"""A hub for the client in this process."""

from collections.abc import Iterator

import pytest

from tests import hub as hubs
from tests.hub import Hub

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
