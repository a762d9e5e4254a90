"""Lays out tables for a terminal of any width, and unwrapped for files and pipes."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_GAP = 2
# The last column wraps within this width or more; with less, each row becomes a paragraph.
_LEAST_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Column:
    """A column; `is_right` aligns numbers."""

    title: str
    is_right: bool = False


def print_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, is_wide: bool
) -> None:
    """Print rows below the titles; `is_wide` for a file or a pipe: each row is one line.

    On a terminal the last column wraps; if there is no room for the others, each row is printed
    as its first cell with the others below it.
    """
    widths = [
        max(cell_len(column.title), *(cell_len(row[number]) for row in rows))
        for number, column in enumerate(columns)
    ]
    if is_wide:
        for row in [[column.title for column in columns], *rows]:
            console.print(Text(_line(columns, widths, row)), soft_wrap=True)
        return
    others = sum(widths[:-1]) + _GAP * (len(widths) - 1)
    if others + min(widths[-1], _LEAST_WIDTH) > console.width:
        _print_paragraphs(console, columns, rows)
        return
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column, width in zip(columns[:-1], widths[:-1], strict=True):
        justify = "right" if column.is_right else "left"
        table.add_column(column.title, justify=justify, no_wrap=True, min_width=width)  # type: ignore[arg-type]
    last = columns[-1]
    table.add_column(last.title, justify="right" if last.is_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str]) -> str:
    cells = []
    for column, width, text in zip(columns, widths, row, strict=True):
        space = " " * (width - cell_len(text))
        cells.append(space + text if column.is_right else text + space)
    return (" " * _GAP).join(cells).rstrip()


def _print_paragraphs(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]
) -> None:
    for row in rows:
        console.print(Text(row[0], style="bold", overflow="fold"))
        for column, text in zip(columns[1:], row[1:], strict=True):
            if text:
                line = Text(f"{column.title.lower()}: {text}", overflow="fold")
                console.print(Padding(line, (0, 0, 0, _GAP)))
