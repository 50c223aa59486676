"""Documents are read line by line, and problems are reported with file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from quant.calibration import documents
from quant.calibration.documents import Document, list_set_files, load_documents
from quant.core.errors import InputError

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "1"}
WHOLE: dict[str, Any] = {
    "id": "a",
    "language": "en",
    "thinking": True,
    "tools": [{"name": "f"}],
    "messages": [USER],
}


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join(
            (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)) + "\n" for x in lines
        )
    )
    return path


def test_a_line_is_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", WHOLE, {"id": "b", "messages": [USER, ANSWER]})
    assert load_documents(str(path)) == (
        Document("a", "en", True, (USER,), ({"name": "f"},)),
        Document("b", "", False, (USER, ANSWER), ()),
    )


def test_a_folder_is_a_set_and_its_files_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", WHOLE | {"id": name})
    (tmp_path / "README.md").write_text("not a document")
    assert [d.id for d in load_documents(str(tmp_path))] == ["a", "b", "c"]


def test_a_set_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    path = write(tmp_path / "mine" / "x.jsonl", WHOLE)
    monkeypatch.setattr(documents, "SETS", tmp_path)
    assert list_set_files("mine") == (path,)
    with pytest.raises(
        InputError, match=r"calibration set 'mime' is not known: did you mean 'mine'"
    ):
        load_documents("mime")


def test_an_empty_folder_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not known"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\u00a0"])
def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path, letter: str) -> None:
    path = write(
        tmp_path / "x.jsonl",
        WHOLE | {"messages": [{"role": "user", "content": f"a{letter}b"}]},
        WHOLE,
    )
    first, second = load_documents(str(path))
    assert first.messages[0]["content"] == f"a{letter}b"
    assert second.id == "a"


def test_lines_may_end_with_crlf(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes((json.dumps(WHOLE) + "\r\n").encode() * 2)
    assert len(load_documents(str(path))) == 2


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(WHOLE))
    assert len(load_documents(str(path))) == 1


def lacking(key: str) -> dict[str, Any]:
    return {k: v for k, v in WHOLE.items() if k != key}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected a JSON object, found something else (Expecting"),
        ("", "expected a JSON object, found something else (Expecting"),
        ("5", "expected a JSON object, found 5"),
        ("null", "expected a JSON object, found null"),
        ('["id"]', 'expected a JSON object, found ["id"]'),
        (WHOLE | {"mesages": []}, "mesages: unknown key; did you mean 'messages'?"),
        (lacking("id"), "id: missing"),
        (lacking("messages"), "messages: expected at least one, found none"),
        (WHOLE | {"messages": []}, "messages: expected at least one, found none"),
        (WHOLE | {"messages": "Hello"}, "messages: expected a list, found 'Hello'"),
        (
            WHOLE | {"messages": ["Hello"]},
            "messages[0]: expected an object with a role, found 'Hello'",
        ),
        (
            WHOLE | {"messages": [USER, {"content": "x"}]},
            "messages[1]: expected an object with a role, found {'content': 'x'}",
        ),
        (WHOLE | {"thinking": "false"}, "thinking: expected true or false, found 'false'"),
        (WHOLE | {"tools": {"name": "f"}}, "tools: expected a list, found {'name': 'f'}"),
        (WHOLE | {"id": 5}, "id: expected text, found 5"),
        (WHOLE | {"text": "a"}, "text: expected text or messages, found both"),
        ({"id": "a", "text": ""}, "text: expected some, found none"),
    ],
)
def test_a_broken_line_is_reported_with_file_and_number(
    tmp_path: Path, line: Any, expected: str
) -> None:
    path = write(tmp_path / "x.jsonl", WHOLE, line, WHOLE)
    with pytest.raises(InputError) as caught:
        load_documents(str(path))
    [problem] = caught.value.problems
    assert problem.startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [ANSWER],
            "messages[0].role: roles out of order: expected system or user at the beginning, found assistant",
        ),
        (
            [USER, USER],
            "messages[1].role: roles out of order: expected assistant after user, found user",
        ),
        (
            [USER, ANSWER, RESULT],
            "messages[2].role: roles out of order: expected user after assistant, found tool",
        ),
        (
            [USER, CALL, ANSWER],
            "messages[2].role: roles out of order: expected tool after calls, found assistant",
        ),
        (
            [USER, {"role": "narrator"}],
            "messages[1].role: roles out of order: expected assistant after user, found narrator",
        ),
    ],
)
def test_roles_out_of_order_are_reported(
    tmp_path: Path, messages: list[dict[str, Any]], expected: str
) -> None:
    path = write(tmp_path / "x.jsonl", WHOLE, WHOLE | {"messages": messages})
    with pytest.raises(InputError) as caught:
        load_documents(str(path))
    assert caught.value.problems == (f"{path}:2: {expected}",)


def test_a_conversation_with_tools_is_in_order(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "x"},
        USER,
        CALL,
        RESULT,
        RESULT,
        ANSWER,
        USER,
        ANSWER,
    ]
    assert (
        len(load_documents(str(write(tmp_path / "x.jsonl", WHOLE | {"messages": messages})))) == 1
    )


def test_a_document_may_be_plain_text(tmp_path: Path) -> None:
    [document] = load_documents(
        str(write(tmp_path / "x.jsonl", {"id": "a", "text": "Once upon a time"}))
    )
    assert (document.text, document.messages, document.words()) == (
        "Once upon a time",
        (),
        "Once upon a time",
    )


@pytest.mark.parametrize("content", ["", "\n", "   \n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"x.jsonl: expected documents, found an empty file"):
        load_documents(str(tmp_path / "x.jsonl"))


def test_all_problems_of_a_line_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"idd": "a", "thinking": 1})
    with pytest.raises(InputError) as caught:
        load_documents(str(path))
    assert len(caught.value.problems) == 4


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"x.jsonl: expected UTF-8"):
        load_documents(str(path))
    folder = tmp_path / "set"
    (folder / "x.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"x.jsonl: cannot be read \(Is a directory\)"):
        load_documents(str(folder))
