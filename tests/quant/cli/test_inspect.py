"""``quant inspect``: what a file says of itself, for people and for programs."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quant.cli.options import quant, shorten
from tests.gguf_files import TWO, key, write


def inspect(*arguments: str | Path) -> str:
    result = CliRunner().invoke(quant, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr == ""
    return result.stdout


def test_the_json_has_every_tensor_and_the_length_of_lists(tmp_path: Path) -> None:
    document = json.loads(inspect(write(tmp_path / "f.gguf"), "--json"))
    assert document["file"] == "f.gguf"
    assert document["tensors"] == [
        {"name": "a.weight", "type": "F32", "shape": [32, 2], "bytes": 256},
        {"name": "b.weight", "type": "Q8_0", "shape": [64, 2], "bytes": 136},
    ]
    assert document["metadata"]["general.name"] == "tiny"
    assert document["metadata"]["tokenizer.ggml.tokens"] == "[3 values]"


def test_without_json_tables_and_totals_are_printed(tmp_path: Path) -> None:
    text = inspect(write(tmp_path / "f.gguf"))
    assert text.splitlines()[-1] == "2 tensors, 192 weights, 0.4 kB, 16.33 bits per weight"
    assert "general.architecture" in text
    assert "64 x 2" in text


def test_all_shards_of_a_split_are_listed(tmp_path: Path) -> None:
    for n in (0, 1):
        write(
            tmp_path / f"m-{n + 1:05d}-of-00002.gguf",
            [TWO[n]],
            [key("split.no", n), key("split.count", 2)],
        )
    assert "2 tensors" in inspect(tmp_path / "m-00001-of-00002.gguf")


def test_a_file_without_tensors_is_no_error(tmp_path: Path) -> None:
    assert "0 tensors, 0 weights" in inspect(write(tmp_path / "f.gguf", [], []))


def test_nan_in_metadata_is_still_valid_json(tmp_path: Path) -> None:
    document = inspect(
        write(tmp_path / "f.gguf", [], [key("x.nan", float("nan")), key("x.inf", float("inf"))]),
        "--json",
    )
    assert json.loads(document, parse_constant=pytest.fail)["metadata"]["x.nan"] == "nan"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n  b\tc", "a b c"),
        (1.5, "1.5"),
        ("x" * 110, "x" * 110),
        ("x" * 111, "x" * 107 + "..."),
        ("[red]x[/red]", "[red]x[/red]"),
    ],
)
def test_a_value_becomes_one_short_line(value: object, text: str) -> None:
    assert shorten(value) == text


def test_brackets_in_metadata_are_text_and_no_style(tmp_path: Path) -> None:
    text = inspect(write(tmp_path / "f.gguf", [], [key("general.name", "[red]tiny[/red] [/bold]")]))
    assert "[red]tiny[/red] [/bold]" in text
