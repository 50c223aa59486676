"""Rendering in the sandbox and by a real llama-server: limits, and agreement of the engines."""

import os
import tempfile
from pathlib import Path

import pytest

from quant.chat.engines import (
    NOT_TRIED,
    decode_arguments,
    find_fatal_error,
    render_by_server,
    render_in_sandbox,
)
from quant.chat.families import SpecialTokens
from quant.chat.messages import Conversation, calls, result, user
from quant.chat.renderings import Rendering, RenderRequest, list_requests
from quant.chat.rules import find_disagreements
from quant.chat.sandbox import SandboxLimits
from quant.chat.stub_model import write_stub_model
from quant.core.errors import ToolError
from quant.llama.gguf import read_header
from quant.llama.toolchain import find_toolchain
from tests.quant.chat.templates import CONVERSATIONS, FILES, GLM, ORIGINALS, PATCHED, RENDERED

ONE = Conversation("one", (user("Hello"),))
REQUESTS = [
    RenderRequest(ONE, "default", "prompt", 1, None),
    RenderRequest(ONE, "off", "prompt", 1, False),
]
FIRST, SECOND = (request.name for request in REQUESTS)


def child(template: str, **limits: float) -> tuple[Rendering, Rendering]:
    """What becomes of the first request, and of one behind it."""
    renderings = render_in_sandbox(template, REQUESTS, limits=SandboxLimits(**limits))  # type: ignore[arg-type]
    return renderings[FIRST], renderings[SECOND]


def test_the_sandbox_renders_what_this_process_renders() -> None:
    assert (
        render_in_sandbox(PATCHED["glm-4.6"], list_requests(CONVERSATIONS)) == RENDERED["glm-4.6"]
    )


def test_the_sandbox_passes_variables_tokens_and_tools() -> None:
    template = (
        "{{ bos_token }}{{ eos_token }}{{ enable_thinking }}{{ tools }}{{ add_generation_prompt }}"
    )
    renderings = render_in_sandbox(template, REQUESTS, tokens=SpecialTokens("B", "E"))
    assert [renderings[name].text for name in (FIRST, SECOND)] == ["BENoneTrue", "BEFalseNoneTrue"]


def test_an_endless_template_is_ended() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    first, second = child(endless, seconds=0.2)
    assert first == Rendering(None, "chat template: rendering takes longer than 0.2 s")
    assert second.error == f"{NOT_TRIED} ({first.error})"


def test_a_long_calculation_is_ended_too() -> None:
    assert (
        child("{{ 9 ** (9 ** 9) }}", seconds=0.2)[0].error
        == "chat template: rendering takes longer than 0.2 s"
    )


def test_the_kernel_ends_what_python_cannot_interrupt() -> None:
    first, second = child("{{ 9 ** (9 ** 9) }}", seconds=99, all_seconds=1)
    assert first.error.startswith("chat template: the renderer was ended by SIG")
    assert first.error.endswith(", at its limit of time or memory")
    assert second.error.startswith(NOT_TRIED)


def test_a_text_that_takes_all_memory_is_refused() -> None:
    first, second = child("{{ 'x' * (2 ** 33) }}")
    assert first == Rendering(None, "chat template: rendering takes more than 512 MiB of memory")
    assert second.error.startswith(NOT_TRIED)


def test_a_text_that_is_too_long_is_refused() -> None:
    first, _ = child("{{ 'x' * 1001 }}", characters=1000)
    assert first == Rendering(None, "chat template: the text is longer than 1,000 characters")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% for %}", "Expected an expression, got 'end of statement block' (line 2, column 8)"),
        (
            "\n\n{{ ''.__class__.__mro__ }}",
            "access to attribute '__class__' of 'str' object is unsafe. (line 3)",
        ),
        ("{{ x.y.z }}", "'x' is undefined (line 1)"),
    ],
)
def test_an_error_in_a_template_is_one_line_with_its_number(template: str, words: str) -> None:
    first, second = child(template)
    assert first.error == second.error == f"chat template: cannot render the conversation: {words}"


def test_the_sandbox_gets_no_token_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    environments = []
    monkeypatch.setattr(
        "quant.core.process.run_program", lambda *_, env, **__: environments.append(env)
    )
    render_in_sandbox("x", REQUESTS)
    assert "HF_TOKEN" not in environments[0] and environments[0]["HF_HUB_OFFLINE"] == "1"
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_a_sandbox_that_crashes_is_reported() -> None:
    renderings = render_in_sandbox("x", REQUESTS, engine="no such engine")
    assert renderings[FIRST].error == "chat template: the renderer exited with 1"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (["", ""], None),
        (["e", ""], None),
        (["e", "f"], "f"),
        (["e", f"{NOT_TRIED} (e)"], "e"),
    ],
)
def test_an_error_is_fatal_if_all_fail_or_a_limit_was_reached(
    errors: list[str], expected: str | None
) -> None:
    renderings = {
        str(n): Rendering(None if error else "text", error) for n, error in enumerate(errors)
    }
    assert find_fatal_error(renderings) == expected


def test_arguments_are_decoded_as_servers_do_it() -> None:
    given = [user("a"), calls('{"a": 1}', {"b": 2}, None, "no JSON"), result("c")]
    decoded = decode_arguments(given)
    assert [call["function"]["arguments"] for call in decoded[1]["tool_calls"]] == [
        {"a": 1},
        {"b": 2},
        None,
        "no JSON",
    ]
    assert given[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    odd = {
        "role": "assistant",
        "tool_calls": [{"name": "flat"}, {"function": "text"}, "text", None],
    }
    odder = {"role": "assistant", "tool_calls": "text"}
    assert decode_arguments([odd, odder]) == [odd, odder]


def test_the_stub_model_has_the_template_and_every_control_token(tmp_path: Path) -> None:
    write_stub_model(
        tmp_path / "stub.gguf", "{{ x }}", SpecialTokens("<s>", "</s>"), GLM.control_tokens
    )
    header = read_header(tmp_path / "stub.gguf")
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert header.metadata["tokenizer.chat_template"] == "{{ x }}"
    assert tokens[header.metadata["tokenizer.ggml.bos_token_id"]] == "<s>"
    assert tokens[header.metadata["tokenizer.ggml.eos_token_id"]] == "</s>"
    assert len(set(tokens)) == len(tokens) and "<tool_call>" in tokens
    assert (tmp_path / "stub.gguf").stat().st_size < 10**6


@pytest.mark.tools
@pytest.mark.parametrize("family", FILES)
def test_transformers_renders_every_conversation_the_same(family: str) -> None:
    theirs = render_in_sandbox(PATCHED[family], list_requests(CONVERSATIONS), "transformers")
    assert list(find_disagreements("transformers", theirs, RENDERED[family], CONVERSATIONS)) == []


@pytest.mark.tools
@pytest.mark.parametrize("family", FILES)
def test_llama_server_renders_every_conversation_the_same(family: str) -> None:
    theirs = render_by_server(
        PATCHED[family], list_requests(CONVERSATIONS), find_toolchain(), GLM, GLM.special_tokens
    )
    assert len(theirs) > 200
    assert list(find_disagreements("llama-server", theirs, RENDERED[family], CONVERSATIONS)) == []


@pytest.mark.tools
def test_llama_server_shows_the_fault_of_the_original() -> None:
    conversations = tuple(
        c
        for c in CONVERSATIONS
        if c.name in ("one turn", "a result as parts", "a call, content null")
    )
    theirs = render_by_server(
        ORIGINALS["glm-4.7"],
        list_requests(conversations),
        find_toolchain(),
        GLM,
        GLM.special_tokens,
    )
    conversations_with_faults = {
        f.conversation
        for f in find_disagreements("llama-server", theirs, RENDERED["glm-4.7"], conversations)
    }
    assert conversations_with_faults == {"a result as parts"}
    assert "<tool_response></tool_response>" in str(
        theirs["a result as parts, thinking off, prompt 3"].text
    )


@pytest.mark.tools
def test_a_template_that_the_server_cannot_read_is_reported_with_its_log() -> None:
    with pytest.raises(ToolError, match="llama-server exited with 1") as caught:
        render_by_server("{% for %}", REQUESTS, find_toolchain(), GLM, GLM.special_tokens)
    assert "end of the log" in str(caught.value)
