"""`quant template`: its output and its exit codes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant import cli
from quant.chat import check as checks
from quant.chat.conversations import TOOLS
from quant.llama.gguf import read_header
from tests.gguf_files import LLAMA, key, write
from tests.quant.chat.templates import SHORT
from tests.quant.chat.test_template import ORIGINAL, PATCHED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command with arguments: its exit code, its standard output, its standard error."""

    def go(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quant", "template", *map(str, arguments)])
        try:
            code = cli._run()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return go


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", keys=[*LLAMA, key("tokenizer.chat_template", ORIGINAL)])


def test_patch_reports_what_was_written(run: Run, gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.gguf"
    code, printed, error = run("patch", gguf, "-o", out)
    assert (code, printed) == (0, "")
    assert error.startswith(f"{out}: tokenizer.chat_template patched by glm-4.6, sha256 ")
    assert read_header(out).metadata["tokenizer.chat_template"] == PATCHED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.gguf"], "nowhere.gguf: cannot be read"),
        (["bare.gguf"], "bare.gguf: tokenizer.chat_template: missing"),
        (["other.gguf"], "found none"),
        (["other.gguf", "--patch", "glm-4.6"], "found it 0 times"),
        (["model.gguf", "--patch", "glm-46"], "did you mean 'glm-4.6'?"),
        (["m-00001-of-00002.gguf"], "m-00002-of-00002.gguf: missing"),
    ],
)
def test_wrong_input_is_reported_and_exits_with_2(
    arguments: list[str], words: str, run: Run, gguf: Path, tmp_path: Path
) -> None:
    write(tmp_path / "bare.gguf")
    write(tmp_path / "other.gguf", keys=[*LLAMA, key("tokenizer.chat_template", "{{ messages }}")])
    write(
        tmp_path / "m-00001-of-00002.gguf", keys=[*LLAMA, key("split.no", 0), key("split.count", 2)]
    )
    code, printed, error = run(
        "patch", tmp_path / arguments[0], *arguments[1:], "-o", tmp_path / "new.gguf"
    )
    assert (code, printed) == (2, "")
    assert all(line.startswith(("error: ", "    ")) for line in error.splitlines())
    assert words in error
    assert not (tmp_path / "new.gguf").exists()


def test_patch_does_not_overwrite(run: Run, gguf: Path) -> None:
    code, _, error = run("patch", gguf, "-o", gguf)
    assert code == 2
    assert "exists already" in error


def conversation(folder: Path, content: object) -> Path:
    path = folder / "talk.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_render_prints_the_prompt(run: Run, tmp_path: Path) -> None:
    talk = conversation(tmp_path, [{"role": "user", "content": "Grüße"}])
    code, printed, error = run("render", "glm-4.6", talk)
    assert (code, printed) == (0, "[gMASK]<sop><|user|>\nGrüße<|assistant|>")
    assert error.startswith("template: ") and error.endswith("GLM-4.6.jinja, patched by glm-4.6\n")


def test_render_without_thinking_with_tools_from_a_file(
    run: Run, gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps({"tools": TOOLS}))
    talk = conversation(tmp_path, {"messages": [{"role": "user", "content": "Hi"}]})
    code, printed, error = run(
        "render", gguf, talk, "--no-thinking", "--tools", tmp_path / "tools.json"
    )
    assert code == 0
    assert printed.endswith("<|user|>\nHi/nothink<|assistant|>\n<think></think>")
    assert "天气" in printed
    assert error == f"template: {gguf}\n"


def test_render_adds_no_generation_prompt_after_an_answer(run: Run, tmp_path: Path) -> None:
    talk = conversation(
        tmp_path, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert run("render", "glm-4.7", talk)[1] == "[gMASK]<sop><|user|>a<|assistant|></think>b"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected JSON, found something else"),
        ("[]", "expected a list of messages, each an object"),
        ('["a"]', "expected a list of messages, each an object"),
        ('{"message": []}', "expected a list of messages, each an object"),
        (
            '[{"content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]}]',
            None,
        ),
        (
            '[{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]',
            "Invalid tool call arguments passed: [1] (line 79)",
        ),
    ],
)
def test_a_malformed_conversation_is_reported(
    content: str, words: str | None, run: Run, tmp_path: Path
) -> None:
    code, printed, error = run("render", "glm-4.6", conversation(tmp_path, content))
    if words:
        assert (code, printed) == (2, "")
        assert words in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_missing_file_is_reported(run: Run, tmp_path: Path) -> None:
    code, _, error = run("render", "glm-4.6", tmp_path / "no.json")
    assert code == 2
    assert error == f"error: {tmp_path / 'no.json'}: cannot be read (No such file or directory)\n"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three conversations, because a check of all takes its time."""
    whole = checks.check_template
    monkeypatch.setattr(
        checks, "check_template", lambda template, tools: whole(template, tools, SHORT)
    )


@pytest.mark.tools
@pytest.mark.usefixtures("few")
def test_check_of_a_good_template_exits_with_0(run: Run) -> None:
    code, printed, _ = run("check", "glm-4.6", "--no-server")
    assert code == 0
    assert printed.splitlines()[0].endswith("GLM-4.6.jinja, patched by glm-4.6")
    assert printed.splitlines()[-1].startswith(
        "3 conversations; texts compared: jinja 27, transformers 27"
    )
    assert printed.splitlines()[-1].endswith("; 0 conversations fail")


@pytest.mark.tools
@pytest.mark.usefixtures("few")
def test_check_names_the_conversations_that_fail_and_shows_the_difference(
    run: Run, gguf: Path
) -> None:
    code, printed, _ = run("check", gguf, "--no-server")
    assert code == 1
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert failed == [
        "FAILED a result as parts: tool results (jinja)",
        "FAILED raw reasoning, two turns: past stays (jinja)",
    ]
    assert "    -<think>They greet me at length.</think>" in printed.splitlines()
    assert printed.splitlines()[-1].endswith("; 2 conversations fail")


@pytest.mark.tools
@pytest.mark.usefixtures("few")
def test_check_as_json_is_one_document(run: Run, gguf: Path) -> None:
    code, printed, _ = run("check", gguf, "--no-server", "--json")
    report = json.loads(printed)
    assert code == 1
    assert (report["name"], report["passed"], report["conversations"]) == ("model.gguf", False, 3)
    assert report["template"]["patch"] is None
    assert {f["rule"] for f in report["faults"]} == {"past stays", "tool results"}
    assert {"rule", "conversation", "where", "detail", "diff", "engine"} == report["faults"][
        0
    ].keys()


def test_check_of_a_file_without_a_template_ends_with_2(run: Run, tmp_path: Path) -> None:
    code, _, error = run("check", write(tmp_path / "a.gguf"))
    assert code == 2
    assert "tokenizer.chat_template: missing" in error
