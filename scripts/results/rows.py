"""The rows of the tables, as `rows.yaml` lists them, and the runs that each of them needs."""

from __future__ import annotations

import fnmatch
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

HERE = Path(__file__).parent
DATA = HERE / "data"


@dataclass(frozen=True)
class Row:
    """A row of a table: one command, which is run once for each seed.

    Args:
        table: Name of the table.
        name: Name of the row within its table.
        words: What stands after `metarun` in the command.
        seeds: Seeds to run the command with; empty for the command as it is.
        label: What the row is called where the result itself does not say so.
    """

    table: str
    name: str
    words: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    label: str = ""

    @property
    def id(self) -> str:
        """`table/row`."""
        return f"{self.table}/{self.name}"

    @property
    def command(self) -> str:
        """The command as a reader types it, without a seed where there are several."""
        return " ".join(["metarun", *self.words])

    @property
    def runs(self) -> list[Run]:
        """The runs of this row, one for each seed."""
        return [Run(self, seed) for seed in self.seeds] or [Run(self, None)]


@dataclass(frozen=True)
class Run:
    """One run of a row's command."""

    row: Row
    seed: int | None

    @property
    def id(self) -> str:
        """`table/row`, and `.seedN` where the row has seeds."""
        return self.row.id + ("" if self.seed is None else f".seed{self.seed}")

    @property
    def words(self) -> list[str]:
        """The overrides that reproduce the run."""
        return [*self.row.words, *([] if self.seed is None else [f"seed={self.seed}"])]

    @property
    def command(self) -> str:
        """The command as a reader types it."""
        return " ".join(["metarun", *self.words])

    @property
    def arguments(self) -> list[str]:
        """The overrides with the environment's variables in them replaced, as a shell does it."""
        return [os.path.expandvars(word) for word in self.words]

    @property
    def places(self) -> dict[str, str]:
        """The values that the environment's variables made of this machine, and how the row writes them."""
        pairs = zip(self.arguments, self.words, strict=True)
        return {here.partition("=")[2]: typed.partition("=")[2] for here, typed in pairs if here != typed}

    @property
    def name(self) -> str:
        """The name of the run, below which its folder lies."""
        return self.id.replace("/", "-")

    def stored(self, data: Path = DATA) -> Path:
        """The file of the run's result."""
        return data / f"{self.id}.json"


@dataclass(frozen=True)
class Table:
    """A table: its rows, in their order, and how they are shown.

    Args:
        name: Name of the table, which is that of its markers too.
        kind: Name of the function in `tables.py` that writes it.
        rows: Its rows.
        options: Further settings of that function.
    """

    name: str
    kind: str
    rows: list[Row]
    options: dict[str, Any]


def load(path: Path = HERE / "rows.yaml") -> dict[str, Table]:
    """Reads the tables.

    Args:
        path: A file as `rows.yaml`.

    Returns:
        The tables by name.
    """
    tables = {}
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        seeds = tuple(entry.pop("seeds", ()))
        rows = [row(name, key, value, seeds) for key, value in entry.pop("rows").items()]
        tables[name] = Table(name, entry.pop("kind"), rows, entry)
    return tables


def row(table: str, name: str, entry: str | dict[str, Any], seeds: tuple[int, ...]) -> Row:
    """A row from its entry, which is a command or a mapping with one; `seeds` are those of the table."""
    settings: dict[str, Any] = {"command": entry} if isinstance(entry, str) else dict(entry)
    program, *words = shlex.split(settings.pop("command"))
    if program != "metarun":
        raise SystemExit(f"results: the command of {table}/{name} begins with {program}, not with metarun")
    return Row(table, name, tuple(words), tuple(settings.pop("seeds", seeds)), **settings)


def selected(tables: dict[str, Table], patterns: list[str]) -> list[Run]:
    """The runs whose id, row, or table a pattern matches; without patterns all runs."""
    runs = [run for table in tables.values() for row in table.rows for run in row.runs]
    if not patterns:
        return runs
    return [
        run
        for run in runs
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (run.id, run.row.id, run.row.table))
    ]
