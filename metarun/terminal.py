"""The terminal that tables go to."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED = 120  # columns of what goes to a file or another program
NARROW = 60  # columns below which a table would lose its numbers, and is told line by line


def columns_given() -> int | None:
    """The columns of the terminal, or those that COLUMNS asks for; None where the output is read otherwise."""
    # Rich would believe COLUMNS=0, which some shells set, and show nothing.
    asked = os.environ.get("COLUMNS", "")
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return int(asked) or None if asked.isdecimal() else None


class Terminal(Console):
    """Standard output, as wide as it is; where nobody reads on, the error that any other output meets.

    A text stands as it is: names of others may hold what rich takes for markup or for an emoji.

    Args:
        width: Its columns; None for as many as there are.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width=width or columns_given() or PIPED, markup=False, emoji=False)

    def on_broken_pipe(self) -> NoReturn:
        """Raises `BrokenPipeError`, of which rich would make exit status 1."""
        raise BrokenPipeError

    def show(self, table: Table, whole: bool = False) -> None:
        """Prints a table.

        Args:
            table: The table. Where the terminal is too narrow for its numbers each stands in a line of its own, behind its heading.
            whole: Whether its lines are not to be folded in any case.
        """
        if whole:
            self.width = max(self.width, Terminal(1000).measure(table).maximum)
        elif self.width < NARROW:
            self.tell(table)
            return
        self.print(table)

    def tell(self, table: Table) -> None:
        """Prints a table without its columns: a paragraph for each row."""
        headings = [_words(column.header) for column in table.columns]
        paragraphs = [
            [f"{heading} {text}".strip() for heading, cell in zip(headings, row, strict=True) if (text := _words(cell))]
            for row in zip(*(column.cells for column in table.columns), strict=True)
        ]
        title, caption = (str(text or "").splitlines() for text in (table.title, table.caption))
        for lines in ([*map(_words, title)], *paragraphs, [*map(_words, caption)]):
            if any(lines):
                self.print("\n".join(lines), "", sep="\n", overflow="fold", highlight=False)


def _words(cell: Any) -> str:
    """What a cell, a title or a heading says; empty for none."""
    return " ".join(cell.plain.split() if isinstance(cell, Text) else str(cell or "").split())
