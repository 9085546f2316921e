"""`recipe=runs`: the runs so far, finished or not, as a table that fits the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from rich.text import Text

from metarun import files
from metarun.config.overrides import key_of
from metarun.errors import UserError
from metarun.report.collect import NothingTested, Unreadable, check_usable, has_result, read, run_folders
from metarun.report.command import check_words, folders
from metarun.report.finished import words_of
from metarun.report.text import main_number
from metarun.runs import contents
from metarun.runs.folder import UNNAMED, stored_config
from metarun.terminal import Terminal, columns_given
from metarun.text import counted, printable, shell_path

LEAST = 4  # columns of the column that may wrap, below which each run is told line by line
UNREADABLE = "cannot be read"  # the state of a run that the system keeps from the reader


@dataclass(frozen=True)
class Entry:
    """What is told of a run.

    Attributes:
        folder: Its folder.
        name: The name that it shares with other runs: that of the folder above.
        overridden: What was overridden, as it was typed; without a result the name of the folder, which may cut it short.
        result: The main test number with half of its interval; else the validation score; empty without a result.
        state: How far it is.
        when: When it was last written to, seconds since the epoch.
    """

    folder: Path
    name: str
    overridden: str
    result: str
    state: str
    when: float


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Prints the table of the runs below `config.runs`, or below `config.outputs`; returns nothing.

    Raises:
        UserError: A folder is not there, or no run lies in it.
    """
    check_words(config, overrides)
    roots = folders(config, required=False)
    lines = sorted(found(roots), key=lambda line: line.when)
    if not lines:
        raise UserError(f"recipe=runs: no run lies in {', '.join(map(shell_path, roots))}; runs= names another folder")
    show(lines)
    return {}


def found(roots: Sequence[Path]) -> Iterator[Entry]:
    """The runs below some folders, in the order of their names."""
    for folder in run_folders(roots, Path()):
        yield described(folder)


def described(folder: Path) -> Entry:
    """What is told of the run in a folder."""
    told: dict[str, Any] = {"folder": folder, "name": folder.parent.name, "overridden": folder.name.replace("__", " ")}
    try:
        when = max((path.stat().st_mtime for path in folder.iterdir() if path.is_file()), default=0.0)
    except OSError:
        return Entry(**told, result="", state=UNREADABLE, when=folder.lstat().st_mtime)
    try:
        if not has_result(folder):
            return Entry(**told, result="", state=progress(folder), when=when)
        finished = read(folder)
        check_usable(finished)
    except NothingTested:
        return Entry(**told, result="", state="finished", when=when)
    except Unreadable as error:
        return Entry(**told, result="", state=_harm(error, error.path), when=when)
    number = main_number(finished.result, brief=True)
    typed = [word for word in words_of(finished.result) if "=" in word and key_of(word) not in UNNAMED]
    told["overridden"] = " ".join(typed) or told["overridden"]
    return Entry(**told, result=number, state="finished", when=finished.finished)


def progress(folder: Path) -> str:
    """How far a run without a result is, by its last line of metrics."""
    try:
        config: Any = stored_config(folder / contents.CONFIG, "")
        steps = f" of {config.train.steps:,}" if "train" in config else ""
        last = files.last_json_line(folder / contents.METRICS)
        return f"step {last['step']:,}{steps}" if last else "begun"
    except UserError as error:
        return _harm(error, folder / contents.CONFIG)
    except (OSError, AttributeError, ValueError, TypeError, KeyError, OmegaConfBaseException):
        return "begun"


def _harm(error: Exception, path: Path) -> str:
    """What is wrong with a file of a run, in two words or three."""
    return UNREADABLE if isinstance(error.__cause__, OSError) else f"{path.stem} damaged"


def show(lines: Sequence[Entry]) -> None:
    """Prints the table, the latest run last, and below it the folders by number, which may be longer than a line."""
    headings = ("", "name", "overridden", "result", "when", "state")
    columns = columns_given()
    when = "%Y-%m-%d\n%H:%M" if columns else "%Y-%m-%d %H:%M"
    rows = [
        (
            str(index),
            *map(printable, (line.name, line.overridden, line.result)),
            time.strftime(when, time.localtime(line.when)),
            line.state,
        )
        for index, line in enumerate(lines, 1)
    ]
    table = Table(*headings, title=counted(len(lines), "run"), title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    terminal, room = Terminal(), LEAST
    if columns:  # one column may wrap, the others keep their words whole where they can
        widest = [
            max([len(part) for row in rows for part in row[at].split("\n")] + [len(headings[at])]) for at in range(6)
        ]
        most = (99, 20, 0, 16, 10, 17)
        for at, column in enumerate(table.columns):
            column.width = min(widest[at], most[at])
        others = sum(column.width or 0 for column in table.columns) + 19  # with what stands between them
        room = columns - others
        table.columns[2].width = max(LEAST, min(widest[2], room))
    for row in rows:
        table.add_row(*map(Text, row))
    if room < LEAST:
        terminal.tell(table)
    else:
        terminal.show(table)
    for index, line in enumerate(lines, 1):
        print(f"{index:3}  {shell_path(line.folder)}")
