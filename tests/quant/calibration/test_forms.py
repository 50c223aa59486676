"""Rows become documents; those without a conversation are left out, a missing column is an error."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from quant.calibration.documents import Document
from quant.calibration.forms import NumberedRow, parse_rows
from quant.calibration.sets import CalibrationSource, Form
from quant.core.errors import InputError


def parse(form: str, *rows: dict[str, Any], **more: Any) -> list[Document]:
    source = CalibrationSource("s", "conversation", "MIT", form, path="x", **more)  # type: ignore[arg-type]
    return list(
        parse_rows(
            (NumberedRow(row, f"f.json:{n}", f"f-{n}") for n, row in enumerate(rows, 1)), source
        )
    )


def count_left_out(form: Form, *rows: dict[str, Any], **more: Any) -> dict[str, int]:
    """Return the number of rows that are left out, by reason."""
    source, document = (
        CalibrationSource("s", "conversation", "MIT", form, path="x", **more),
        Counter[str](),
    )
    assert not list(
        parse_rows(
            (NumberedRow(row, f"f.json:{n}", f"f-{n}") for n, row in enumerate(rows)),
            source,
            document,
        )
    )
    return dict(document)


def list_turns(document: Document) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in document.messages]


def turns(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": w} for n, w in enumerate(words)]


def test_messages_are_used_as_they_are() -> None:
    [document] = parse("messages", {"messages": turns("Hi", "Hello", "Bye", "Bye!"), "source": "x"})
    assert list_turns(document) == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", "Bye!"),
    ]
    assert (document.id, document.source, document.kind, document.language, document.thinking) == (
        "f-1",
        "s",
        "conversation",
        "en",
        False,
    )


def test_a_question_without_an_answer_is_dropped_at_the_end() -> None:
    assert list_turns(parse("messages", {"messages": turns("Hi", "Hello", "And?")})[0])[-1] == (
        "assistant",
        "Hello",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": None},
        {"messages": turns("Hi")},
        {"messages": turns("Hi", "")},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {"messages": [*turns("Hi"), *turns("Hi"), {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "narrator", "content": "Hi"}]},
        {"messages": [{"content": "Hi"}]},
    ],
)
def test_a_row_without_a_conversation_is_left_out(row: dict[str, Any]) -> None:
    assert parse("messages", row) == []


def test_reasoning_in_tags_becomes_reasoning_content() -> None:
    for tag in ("think", "thinking"):
        [document] = parse(
            "messages", {"messages": turns("2+2?", f"<{tag}>\nEasy.\n</{tag}>\n\n4")}
        )
        assert document.messages[1] == {
            "role": "assistant",
            "content": "4",
            "reasoning_content": "Easy.",
        }
        assert document.thinking


def test_a_source_may_map_column_names() -> None:
    [document] = parse(
        "pairs", {"inputs": "Q", "targets": "A"}, columns={"input": "inputs", "output": "targets"}
    )
    assert list_turns(document) == [("user", "Q"), ("assistant", "A")]


def test_rows_are_selected_by_column_values() -> None:
    rows = [
        {"input": str(n), "output": "A", "average_test_score": s}
        for n, s in enumerate(("1.0", "0.5", "1"))
    ]
    kept = parse("pairs", *rows, only={"average_test_score": ("1", "1.0")})
    assert [list_turns(d)[0][1] for d in kept] == ["0", "2"]
    assert len(parse("pairs", *rows, without={"average_test_score": ("0.5",)})) == 2


HERMES = {
    "id": "x",
    "tools": json.dumps(
        [{"type": "function", "function": {"name": "area", "parameters": {"type": "object"}}}]
    ),
    "conversations": [
        {"from": "system", "value": "You are a function calling AI model. <tools> [...] </tools>"},
        {"from": "human", "value": "How large is 2 by 3?"},
        {
            "from": "gpt",
            "value": 'Let me see.\n<tool_call>\n{"name": "area", "arguments": {"a": 2, "b": 3}}\n</tool_call>',
        },
        {"from": "tool", "value": '<tool_response>\n{"area": 6}\n</tool_response>'},
        {"from": "gpt", "value": "It is 6."},
    ],
}


def test_tool_calls_are_parsed_from_the_text() -> None:
    [document] = parse("sharegpt", HERMES)
    assert list_turns(document) == [
        ("user", "How large is 2 by 3?"),
        ("assistant", "Let me see."),
        ("tool", '{"area": 6}'),
        ("assistant", "It is 6."),
    ]
    assert document.tools[0]["function"]["name"] == "area"
    [call] = document.messages[1]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "area", "arguments": {"a": 2, "b": 3}}}
    assert document.messages[2]["name"] == "area"


def test_a_system_message_without_tools_stays() -> None:
    plain = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hi"},
    ]
    assert list_turns(parse("sharegpt", {"conversations": plain})[0])[0] == ("system", "Be short.")


def calling(call: str, *results: str) -> dict[str, Any]:
    """Return a row with a question, a tool call, and its results in one turn."""
    list_turns = [
        ("human", "Weather?"),
        ("gpt", call),
        ("tool", "\n".join(results)),
        ("gpt", "Sun."),
    ]
    return {"conversations": [{"from": who, "value": what} for who, what in list_turns if what]}


def call_of(name: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'


def result_of(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"


def test_each_result_of_a_turn_becomes_a_message_with_the_name_of_its_call() -> None:
    [document] = parse(
        "sharegpt", calling(call_of("sky") + call_of("wind"), result_of("blue"), result_of("none"))
    )
    assert [(m["name"], m["content"]) for m in document.messages[2:4]] == [
        ("sky", "blue"),
        ("wind", "none"),
    ]
    assert [m["role"] for m in document.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]


def test_a_result_belongs_to_the_call_that_it_names() -> None:
    turned = [result_of(json.dumps({"name": n, "content": 1})) for n in ("wind", "sky")]
    [document] = parse("sharegpt", calling(call_of("sky") + call_of("wind"), *turned))
    assert [m["name"] for m in document.messages[2:4]] == ["wind", "sky"]
    assert json.loads(document.messages[2]["content"])["name"] == "wind"


def test_a_result_without_a_call_makes_no_document() -> None:
    assert parse("sharegpt", calling(call_of("sky"), result_of("blue"), result_of("none"))) == []


def test_calls_as_python_literals_are_parsed() -> None:
    call = "<tool_call>\n{'name': 'sky', 'arguments': {'day': \"Eve's\", 'exact': True, 'at': None}}\n</tool_call>"
    [document] = parse("sharegpt", calling(call, result_of("blue")))
    [call_message] = document.messages[1]["tool_calls"]
    assert call_message["function"] == {
        "name": "sky",
        "arguments": {"day": "Eve's", "exact": True, "at": None},
    }
    assert document.messages[2]["name"] == "sky"


@pytest.mark.parametrize(
    "call", ["{", "{'name': 'f', 'arguments': {1, 2}}", "f(x)", "{'name': print}", "7", "[" * 9999]
)
def test_a_call_that_is_neither_json_nor_python_makes_no_document(call: str) -> None:
    assert parse("sharegpt", calling(f"<tool_call>{call}</tool_call>", result_of("blue"))) == []


def test_tools_that_cannot_be_parsed_make_no_document() -> None:
    assert parse("sharegpt", {"conversations": HERMES["conversations"], "tools": "{"}) == []


def oasst(
    id_: str, parent: str | None, role: str, text: str, rank: Any = None, lang: str = "en"
) -> dict[str, Any]:
    return {
        "message_id": id_,
        "parent_id": parent,
        "role": role,
        "text": text,
        "rank": rank,
        "lang": lang,
    }


def test_the_best_ranked_replies_of_a_tree_make_a_conversation() -> None:
    rows = [
        oasst("q", None, "prompter", "Frage?", lang="de"),
        oasst("b", "q", "assistant", "schlechter", 1.0),
        oasst("a", "q", "assistant", "besser", 0.0),
        oasst("c", "a", "prompter", "Und dann?"),
        oasst("x", "a", "prompter", "Anders?", 5),
        oasst("d", "x", "assistant", "So."),
        oasst("alone", None, "prompter", "Hört mich wer?"),
    ]
    [document] = parse("tree", *rows)
    assert list_turns(document) == [
        ("user", "Frage?"),
        ("assistant", "besser"),
        ("user", "Anders?"),
        ("assistant", "So."),
    ]
    assert (document.id, document.language) == ("q", "de")


def test_left_out_rows_are_counted_by_reason_and_unselected_rows_are_not() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": turns("Hi")},
        {"messages": turns("Hi", "")},
        {"messages": [{"role": "narrator", "content": "Hi"}]},
        {"messages": turns("Hi", "Hello")[::-1]},
        {"messages": [*turns("Hi"), *turns("Hi", "Hello")]},
        {"messages": 7},
    ]
    assert count_left_out(
        "messages",
        *({**r, "lang": "en"} for r in rows),
        {"lang": "de", "messages": []},
        only={"lang": ("en",)},
    ) == {
        "no answer": 1,
        "an empty message": 1,
        "a role that is not known": 1,
        "roles out of order": 2,
        "not of the form messages": 1,
    }
    assert count_left_out("text", {"text": " "}) == {"no text": 1}
    assert count_left_out(
        "tree", oasst("q", None, "prompter", "?"), oasst("x", "gone", "assistant", "!")
    ) == {"no answer": 1}
    unread = "calls or tools that are neither JSON nor a literal of Python"
    late = calling(call_of("sky"), result_of("blue"), result_of("none"))
    no_list = {"conversations": HERMES["conversations"], "tools": "{}"}
    assert count_left_out(
        "sharegpt",
        calling("<tool_call>f(x)</tool_call>"),
        late,
        {"conversations": [], "tools": "[]"},
        no_list,
    ) == {
        unread: 1,
        "a result that nobody called for": 1,
        "tools that are no list": 1,
        "no answer": 1,
    }


def test_a_text_is_a_document() -> None:
    [document] = parse("text", {"text": "Once upon a time"}, {"text": "  "}, {"text": None})
    assert (document.text, document.messages) == ("Once upon a time", ())


@pytest.mark.parametrize("form", ["messages", "sharegpt", "pairs", "tree", "text"])
def test_a_missing_column_is_reported_with_the_existing_ones(form: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(form, {"something": 1, "else": 2})
    assert all(
        p.startswith("f.json: column ") and p.endswith("missing; the file of s has else, something")
        for p in caught.value.problems
    )
    with pytest.raises(InputError, match="column lang: missing"):
        parse("text", {"text": "x"}, only={"lang": ("en",)})


def test_files_are_read_by_their_suffix(tmp_path: Path) -> None:
    from datasets.arrow_dataset import Dataset

    from quant.calibration.rows import read_rows as rows

    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"text": "2"}\n')
    (tmp_path / "a.json").write_text('[{"text": "1"}, {"text": "2"}]')
    Dataset.from_list([{"text": "1"}, {"text": "2"}]).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        document = list(rows(tmp_path / name))
        assert [r.row["text"] for r in document] == ["1", "2"]
        assert [r.where for r in document] == [f"{tmp_path / name}:1", f"{tmp_path / name}:2"]
    (tmp_path / "a.txt").write_text("\n\n".join(["x" * 3000] * 3) + "\n")
    assert [len(r.row["text"]) for r in rows(tmp_path / "a.txt")] == [3000, 3000, 3001]


@pytest.mark.parametrize(
    ("name", "content", "list_turns"),
    [
        ("a.csv", "x", "expected a file that ends in .jsonl, .json, .parquet, .txt, found .csv"),
        ("a.jsonl", '{"text": "1"}\n{', r"a.jsonl:2: expected a JSON object"),
        ("a.json", "{", "expected JSON"),
        ("a.json", "{}", "expected a list of rows, found dict"),
        ("a.json", "[1]", "a.json:1: expected a JSON object"),
        ("a.parquet", "x", "expected Parquet"),
        ("a.parquet", "PAR1" + "x" * 100, "expected Parquet"),
        ("a.txt", "", "empty file"),
    ],
)
def test_files_that_do_not_match_their_suffix_are_refused(
    tmp_path: Path, name: str, content: str, list_turns: str
) -> None:
    from quant.calibration.rows import read_rows as rows

    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=list_turns):
        list(rows(tmp_path / name))
