"""Tables of labelled texts, as several test files write them."""

from __future__ import annotations

import csv
from pathlib import Path


def table(
    path: Path, rows: list[tuple[str, ...]] | list[tuple[str, str]], header: str = "text,label", **how: str
) -> Path:
    """A table of these rows, written as a spreadsheet writes it."""
    delimiter = how.get("delimiter", ",")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=how.get("encoding", "utf-8")) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header.split(","), *rows])
    return path


def many(classes: list[str], each: int = 6, mark: str = "") -> list[tuple[str, str]]:
    return [(f"{name} text {number}{mark}", name) for name in classes for number in range(each)]
