"""A report that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from reported import grid

from metarun import report


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report over `grid`."""
    root = grid(tmp_path_factory.mktemp("grid"))
    page = report.write([root], root / "report", "a <grid> & more")
    assert page == root / "report" / "index.html"
    return page.parent
