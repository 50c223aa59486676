"""The one part that needs an Ollama: set OLLAMA_HOST to one that may be given a model of 17 MB for the length of a test."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from quant.plan.load import load_model
from quant.release.ollama import make_params
from tests.quant.chat.test_smoke import bf16

__all__ = ["bf16"]
HOST = os.environ.get("OLLAMA_HOST", "")
NAME = "gguf-foundry-test"
pytestmark = [pytest.mark.tools, pytest.mark.skipif(not HOST, reason="OLLAMA_HOST is not set")]
MODEL, _ = load_model("tiny-glm")


@pytest.fixture
def ollama(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    path: Path = request.getfixturevalue("bf16")
    address = HOST if "://" in HOST else f"http://{HOST}"
    with httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        client.post(f"/api/blobs/{digest}", content=path.read_bytes()).raise_for_status()
        body = {
            "model": NAME,
            "files": {path.name: digest},
            "parameters": make_params(MODEL),
            "stream": False,
        }
        client.post("/api/create", json=body).raise_for_status()
        yield client
        client.request("DELETE", "/api/delete", json={"model": NAME})


def test_a_conversation_holds_over_its_turns(ollama: httpx.Client) -> None:
    history: list[dict[str, str]] = []
    for turn in MODEL.smoke:
        history.append({"role": "user", "content": turn.say})
        asked = {"model": NAME, "messages": history, "stream": False, "options": {"temperature": 0}}
        answer = ollama.post("/api/chat", json=asked)
        answer.raise_for_status()
        history.append({"role": "assistant", "content": answer.json()["message"]["content"]})
    assert "Eve" in history[-1]["content"]
    assert not any("<|" in m["content"] for m in history)
