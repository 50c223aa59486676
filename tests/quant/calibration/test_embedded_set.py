"""The embedded calibration set keeps the form that its README promises."""

import json
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

SET = Path(__file__).parents[3] / "calibration" / "sets" / "embedded"
LEAST = {
    "coding": 70,
    "conversation": 55,
    "languages": 36,
    "mathematics": 20,
    "structured": 15,
    "tools": 28,
}
KEYS = ["id", "language", "thinking", "tools", "messages"]
MESSAGE_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
MAY_FOLLOW = {  # after a role (None: the start), these may come
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "calls": {"tool"},
    "tool": {"tool", "assistant"},
}
PROGRAMMING = {
    "bash",
    "c",
    "cpp",
    "csharp",
    "css",
    "dockerfile",
    "elixir",
    "go",
    "haskell",
    "html",
    "java",
    "javascript",
    "julia",
    "kotlin",
    "lua",
    "makefile",
    "ocaml",
    "perl",
    "php",
    "powershell",
    "python",
    "r",
    "ruby",
    "rust",
    "scala",
    "sql",
    "swift",
    "toml",
    "tsx",
    "typescript",
    "yaml",
}
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]|\w+"
)  # kana and Han stand for themselves: they have no spaces

Document = dict[str, Any]


@cache
def documents() -> tuple[tuple[str, Document], ...]:
    """Theme and document, for every line of every file."""
    return tuple(
        (path.stem, json.loads(line))
        for path in sorted(SET.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    )


def text_of(document: Document) -> str:
    parts = [
        message[key]
        for message in document["messages"]
        for key in ("content", "reasoning_content")
        if key in message
    ]
    return "\n".join(parts)


def shingles(text: str, width: int = 8) -> frozenset[tuple[str, ...]]:
    words = WORD.findall(text.casefold())
    return frozenset(tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1)))


@pytest.mark.parametrize("path", sorted(SET.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_line_of_a_file_is_one_json_object(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert "\r" not in text
    assert len(text.splitlines()) == text.count("\n"), "a line separator other than the newline"
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())


def test_documents_have_only_known_keys_in_the_promised_order() -> None:
    for _, doc in documents():
        assert list(doc) == [key for key in KEYS if key in doc], doc.get("id")
        assert set(KEYS) - {"tools"} <= set(doc), doc.get("id")
        assert isinstance(doc["thinking"], bool), doc["id"]
        assert re.fullmatch(r"[a-z]{2,3}(-[A-Z][a-z]{3})?(-[A-Z]{2})?", doc["language"]), doc["id"]


def test_messages_have_only_the_keys_of_their_role() -> None:
    for _, doc in documents():
        for message in doc["messages"]:
            assert set(message) <= MESSAGE_KEYS[message["role"]], doc["id"]
            assert isinstance(message["content"], str), doc["id"]
            assert message["content"].strip() or message.get("tool_calls"), doc["id"]


def test_ids_are_unique_and_begin_with_the_theme_of_their_file() -> None:
    repeated = [name for name, n in Counter(doc["id"] for _, doc in documents()).items() if n > 1]
    assert repeated == []
    for theme, doc in documents():
        assert re.fullmatch(rf"{theme}(-[a-z0-9]+)+", doc["id"]), doc["id"]


def test_roles_follow_each_other_sensibly_and_the_assistant_has_the_last_word() -> None:
    for _, doc in documents():
        before: str | None = None
        for message in doc["messages"]:
            assert message["role"] in MAY_FOLLOW[before], (
                f"{doc['id']}: {message['role']} after {before}"
            )
            before = "calls" if message.get("tool_calls") else message["role"]
        assert before == "assistant", doc["id"]


def test_reasoning_is_there_when_thinking_is_on_and_absent_when_it_is_off() -> None:
    for _, doc in documents():
        reasoning = [message.get("reasoning_content") for message in doc["messages"]]
        assert bool(reasoning[-1]) == doc["thinking"], doc["id"]
        assert doc["thinking"] or not any(reasoning), doc["id"]


def test_tool_calls_keep_to_the_declared_tools() -> None:
    for _, doc in documents():
        declared = {
            tool["function"]["name"]: tool["function"]["parameters"]
            for tool in doc.get("tools", ())
        }
        for message in doc["messages"]:
            for call in message.get("tool_calls", ()):
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                assert name in declared, f"{doc['id']}: {name}"
                assert isinstance(arguments, dict), f"{doc['id']}: {name}"
                assert set(arguments) <= set(declared[name]["properties"]), f"{doc['id']}: {name}"
                assert set(declared[name].get("required", ())) <= set(arguments), (
                    f"{doc['id']}: {name}"
                )


def test_every_tool_call_is_answered_once_before_the_assistant_goes_on() -> None:
    for _, doc in documents():
        waiting: dict[str, str] = {}
        seen: set[str] = set()
        for message in doc["messages"]:
            if message["role"] == "tool":
                assert waiting.pop(message["tool_call_id"], None) == message["name"], doc["id"]
                continue
            assert not waiting, f"{doc['id']}: no result for {sorted(waiting)}"
            waiting = {
                call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())
            }
            assert len(waiting) == len(message.get("tool_calls", ())), doc["id"]
            assert not seen & set(waiting), doc["id"]
            seen |= set(waiting)
        assert not waiting, doc["id"]


def test_every_theme_has_its_share() -> None:
    counts = Counter(theme for theme, _ in documents())
    assert set(counts) == set(LEAST)
    assert {theme: n for theme, n in counts.items() if n < LEAST[theme]} == {}


def test_there_are_two_hundred_documents_and_150000_characters() -> None:
    assert len(documents()) >= 200
    assert sum(len(text_of(doc)) for _, doc in documents()) >= 150_000


def test_the_code_is_in_ten_programming_languages_or_more() -> None:
    tags = {
        tag
        for _, doc in documents()
        for tag in re.findall(r"^```(\w+)$", text_of(doc), re.MULTILINE)
    }
    assert len(tags & PROGRAMMING) >= 10


def test_the_text_is_in_twelve_human_languages_or_more() -> None:
    languages = Counter(doc["language"].partition("-")[0] for _, doc in documents())
    assert len(languages) >= 12
    assert languages["zh"] >= 6
    assert languages["ja"] >= 4
    assert languages["hi"] >= 3
    assert [
        doc["id"]
        for theme, doc in documents()
        if (theme == "languages") == (doc["language"] == "en")
    ] == []


def test_thinking_is_on_in_about_half_of_the_documents() -> None:
    on = sum(doc["thinking"] for _, doc in documents()) / len(documents())
    assert 0.35 <= on <= 0.65


def test_tools_are_called_one_at_a_time_several_at_once_and_sometimes_not_at_all() -> None:
    most = {
        doc["id"]: max(len(message.get("tool_calls", ())) for message in doc["messages"])
        for theme, doc in documents()
        if theme == "tools"
    }
    assert {0, 1, 2} <= set(most.values())
    assert all(doc.get("tools") for theme, doc in documents() if theme == "tools")


def test_no_two_documents_are_alike() -> None:
    sets = {doc["id"]: shingles(text_of(doc)) for _, doc in documents()}
    owners = defaultdict(list)
    for name, own in sets.items():
        for shingle in own:
            owners[shingle].append(name)
    shared = Counter(pair for names in owners.values() for pair in combinations(names, 2))
    alike = [(a, b) for (a, b), n in shared.items() if n / len(sets[a] | sets[b]) > 0.3]
    assert alike == []


def test_the_readme_tells_the_right_counts() -> None:
    table = (SET / "README.md").read_text(encoding="utf-8")
    for theme in LEAST:
        found = [text_of(doc) for name, doc in documents() if name == theme]
        row = f"| `{theme}.jsonl` | {len(found)} | {sum(map(len, found)):,} |"
        assert row in table
