"""What was found: the table of a single run, and the report over many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write(roots: Sequence[Path], to: Path, title: str) -> Path | None:
    """Prints the table over the finished runs below `roots`, and writes everything about them to the folder `to`.

    Returns the page, `to/index.html`; None if no run is finished yet, and then nothing is written.
    """
    from metarun.report import page  # only now: a run's start need not wait for matplotlib

    return page.write(roots, to, title)
