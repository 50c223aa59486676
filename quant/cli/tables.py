"""Tables for people, on standard output."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
) -> None:
    """Print a table; columns whose name begins with ``>`` hold numbers and stand to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, emoji=False)  # a file may hold [/INST], and it means no style
    if not console.is_terminal:
        console.width = (
            10_000  # nothing is cut in a file or a pipe; a table is only as wide as its cells
        )
    console.print(table)
