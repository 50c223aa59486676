"""Tables: nothing is cut where nobody looks, and numbers stand to the right."""

import pytest

from quant.cli import tables


def test_numbers_are_aligned_to_the_right_and_text_to_the_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables.print_table(("name", ">bytes"), [("a", "1"), ("long", "1,000")])
    out, err = capsys.readouterr()
    rows = [line.rstrip() for line in out.splitlines() if line.strip() and "─" not in line]
    assert rows == ["  name   bytes", "  a          1", "  long   1,000"]
    assert err == ""


def test_a_long_cell_is_whole_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a deep folder" * 100
    tables.print_table(("where", ">n"), [(path, "1")])
    out = capsys.readouterr().out
    assert path in out
    assert max(map(len, out.splitlines())) < len(path) + 20


def test_text_in_brackets_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table(("a", "b"), [("[bold]x[/bold]", "[/nothing]")], title="T")
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out
    assert "[/nothing]" in out


def test_an_empty_table_is_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table(("name",), [])
    assert "name" in capsys.readouterr().out
