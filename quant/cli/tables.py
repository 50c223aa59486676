"""Tables for people, on standard output."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
) -> None:
    """Print a table on standard output.

    Args:
        columns: Their titles. A title that begins with ``>`` is of numbers, aligned to the right.
        rows: A cell for each column.
        title: Printed above the table.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*row)
    # No markup: metadata of a file may contain [/INST], which rich would take for a style.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        # rich takes 80 columns for a file or a pipe and would cut cells. A table is only as wide as
        # its cells need.
        console.width = 10_000
    console.print(table)
