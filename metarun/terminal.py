"""The terminal that tables go to."""

from __future__ import annotations

import sys
from typing import NoReturn

from rich.console import Console
from rich.table import Table

PIPED = 120  # columns of what goes to a file or another program
NARROW = 60  # columns below which a table would lose its numbers


class Terminal(Console):
    """Standard output, as wide as it is; where nobody reads on, the error that any other output meets.

    A text stands as it is: names of others may hold what rich takes for markup or for an emoji.

    Args:
        width: Its columns; None for as many as there are.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width=width or (None if sys.stdout.isatty() else PIPED), markup=False, emoji=False)

    def on_broken_pipe(self) -> NoReturn:
        """Raises `BrokenPipeError`, of which rich would make exit status 1."""
        raise BrokenPipeError

    def show(self, table: Table, whole: bool = False) -> None:
        """Prints a table.

        Args:
            table: The table. Where the terminal is too narrow for its numbers it is printed whole, with lines that the
                terminal breaks.
            whole: Whether its lines are not to be folded in any case.
        """
        if whole or self.width < NARROW:
            self.width = max(self.width, Terminal(1000).measure(table).maximum)
        self.print(table)
