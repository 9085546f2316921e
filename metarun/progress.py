"""A bar with the time left, on a terminal and in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SPEED_SECONDS = 1800.0  # over which a bar's speed is taken: steps that take longer than this have no time left told


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose output is no terminal but can show a bar."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the context lasts, on a terminal or in a notebook; elsewhere nothing.

    Args:
        what: The work that is done.
        total: How much there is.
        done: How much was done before.

    Yields:
        A function of how much is done.
    """
    if not sys.stderr.isatty() and not in_notebook():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=SPEED_SECONDS) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda done: bar.update(task, completed=done)
