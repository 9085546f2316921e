"""How far something is: a bar with the time left on a terminal and in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from metarun.text import duration

SPEED_SECONDS = 1800.0  # over which a bar's speed is taken: steps that take longer than this have no time left told
FIRST_LINE, LONGEST_SILENCE = 10.0, 600.0  # seconds; the silence between two lines grows with what has passed

log = logging.getLogger("metarun")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose output is no terminal but can show a bar."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def progress_bar(what: str, total: int, done: int = 0, *, lines: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the context lasts, on a terminal or in a notebook; elsewhere lines with the time left, the later the rarer.

    Args:
        what: The work that is done.
        total: How much there is.
        done: How much was done before.
        lines: Whether there are lines where there is no bar; not where the work has lines of its own.

    Yields:
        A function of how much is done.
    """
    if not sys.stderr.isatty() and not in_notebook():
        yield _lines(what, total, done) if lines else lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=SPEED_SECONDS) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda done: bar.update(task, completed=done)


def _lines(what: str, total: int, before: int) -> Callable[[int], None]:
    """A function of how much is done that logs a line after 10 seconds, 20, 40 and so on, at least every ten minutes."""
    began = time.monotonic()
    due = began + FIRST_LINE

    def advance(done: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due or not before < done < total:
            return
        passed = now - began
        due = now + min(max(passed, FIRST_LINE), LONGEST_SILENCE)
        left = duration(passed / (done - before) * (total - done))
        log.info("%s: %d of %d in %s, so about %s more", what, done, total, duration(passed), left)

    return advance
