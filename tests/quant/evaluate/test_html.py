"""The report page: well-formed, without network, every file in it."""

from html.parser import HTMLParser

import pytest

from quant.evaluate.html import draw_charts, render_report
from tests.quant.evaluate.conftest import make_report_file

FILES = [
    make_report_file("UD-A", 10**9, 0.3),
    make_report_file("UD-<B>", 2 * 10**9, 0.1),
    make_report_file("Q4_K_M", 3 * 10**9, 0.2, peer=True),
]


class TagChecker(HTMLParser):
    """Raise AssertionError for a tag that closes another one than the last that was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def test_every_tag_is_closed_and_every_file_has_a_row_in_both_tables() -> None:
    page = render_report(FILES, "GLM & more", 9.5, ["Q is dominated"])
    checker = TagChecker()
    checker.feed(page)
    assert checker.open == []
    assert page.startswith("<!doctype html>\n") and page.endswith("</html>\n")
    assert page.count("<tr") == 2 * (1 + len(FILES))
    assert "<h1>GLM &amp; more</h1>" in page
    assert "UD-&lt;B&gt;" in page and "UD-<B>" not in page
    assert "<p>Note: Q is dominated.</p>" in page
    assert "Perplexity of BF16:\n9.5." in page


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = render_report(FILES, "GLM", 9.5)
    for word in ("src=", "href=", "@import", "url("):
        assert word not in page


def test_cells_have_the_number_that_a_column_is_sorted_by() -> None:
    page = render_report(FILES, "GLM", 9.5)
    assert '<td data-v="1000000000">1.0 GB</td>' in page
    assert '<td data-v="0.3">0.300 ± 0.22</td>' in page  # half of 0.15 to 0.6


def test_charts_are_in_the_page_as_they_are_in_the_release() -> None:
    page = render_report(FILES, "GLM", 9.5)
    for _, svg in draw_charts(FILES, "GLM").values():
        assert svg in page


def test_one_domain_needs_no_table_of_domains() -> None:
    alone = make_report_file("UD-A", 10**9, 0.3, domains=("code",))
    assert "KLD by domain</h2>" not in render_report([alone], "GLM", 9.5)


@pytest.mark.parametrize("note", ["", "a <b> & c"])
def test_notes_are_escaped(note: str) -> None:
    page = render_report(FILES, "GLM", 9.5, [note] if note else [])
    assert page.count("<p>Note: ") == bool(note)
    assert "a <b>" not in page
