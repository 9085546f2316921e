"""`recipe=report`: the report over the runs below one or several folders."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from metarun.config import Config, check_keys
from metarun.config.overrides import make_literal, refuse_unused, wholes_of_training
from metarun.errors import UserError, nearest
from metarun.runs import contents
from metarun.runs.folder import stored_config
from metarun.text import counted, shell_path, shown_path

READ = ("runs", "outputs")  # the keys


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Writes the report over `config.runs`, and prints its table and where it lies; returns nothing.

    Raises `UserError` if no folder was given, one is not there, or no run in them is finished.
    """
    from metarun import report

    check_words(config, overrides)
    roots = folders(config)
    to = (roots[0] if len(roots) == 1 else Path(config.outputs)) / contents.REPORT
    if report.write(roots, to, title(roots)) is None:
        raise UserError(
            f"runs={','.join(map(shown_path, roots))}: no finished test lies there{what_lies_there(roots, to)}"
        )
    return {}


def what_lies_there(roots: Sequence[Path], to: Path) -> str:
    """Says what the runs are of which a report has nothing to tell, and what to give instead where it is known.

    Args:
        roots: The folders.
        to: The folder of the report, in which no run is looked for.
    """
    from metarun.report.collect import NothingTested, Unreadable, has_result, read, run_folders

    using, unfinished, unreadable = list[Path](), 0, list[str]()
    for folder in run_folders(roots, to.resolve()):
        try:
            if has_result(folder):
                read(folder)
            else:
                unfinished += 1
        except NothingTested:
            using.append(folder)
        except Unreadable as error:
            unreadable.append(str(error))
    kinds = [
        f"{counted(len(using), 'run')} that only used what another has learned (predictions, exports)" if using else "",
        f"{counted(unfinished, 'unfinished run')}" if unfinished else "",
        f"{len(unreadable)} that cannot be read: {unreadable[0]}" if unreadable else "",
    ]
    found = ", ".join(filter(None, kinds))
    instead = next((f"; runs={shell_path(home)} has the run that they used" for home in map(_home, using) if home), "")
    return f", only {found}{instead}" if found else ", and no run at all"


def _home(folder: Path) -> Path | None:
    """The folder of the runs beside the one that a run in `folder` used, where it is still there."""
    used = stored_config(folder / contents.CONFIG, "delete it").get("checkpoint")
    home = Path(str(used)) if Path(str(used)).is_dir() else Path(str(used)).parent
    return home.parent if (home / contents.CONFIG).is_file() else None


def check_words(config: DictConfig, overrides: Sequence[str]) -> None:
    """Checks that a recipe which reads finished runs is asked for nothing else.

    Args:
        config: The config.
        overrides: The words that made it.

    Raises:
        UserError: A key is unknown, or none that it reads.
    """
    check_keys(config, Config)
    parts = {*map(str, config), "optimizer", "schedule", "preset"} - {"recipe", *READ} | wholes_of_training(overrides)
    refuse_unused(overrides, parts, f"it reads {' and '.join(READ)} alone")


def folders(config: DictConfig, required: bool = True) -> list[Path]:
    """The folders of `runs=`.

    Args:
        config: The config, whose paths are made literal.
        required: Whether one must be given; otherwise null is the folder of `outputs=`.

    Raises:
        UserError: None is given, or one is not there.
    """
    make_literal(config, keys=("runs", "outputs"))
    given = list(config.runs) if isinstance(config.runs, ListConfig) else [config.runs]
    if given == [None] and not required:
        given = [config.outputs]
    if not given or None in given:
        raise UserError("recipe=report: needs the folder of the runs to report on; add runs=outputs/NAME")
    roots = [Path(str(folder)) for folder in given]
    for root in roots:
        if not root.is_dir():
            beside = (
                [shell_path(path) for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
            )
            if matched := sorted(found for found in glob.glob(str(root)) if Path(found).is_dir()):
                raise UserError(
                    f"runs={shown_path(root)}: is a pattern, and folders are meant: runs=[{','.join(map(shown_path, matched))}]"
                )
            key = "runs" if config.runs is not None else "outputs"
            raise UserError(f"{key}={shown_path(root)}: there is no such folder{nearest(shell_path(root), beside)}")
    return roots


def title(roots: Sequence[Path]) -> str:
    """The names of the folders."""
    return ", ".join(root.resolve().name for root in roots)
