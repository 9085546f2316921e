"""`recipe=report`: the report over the runs below one or several folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from metarun.config import Config, check_keys
from metarun.config.overrides import make_literal, refuse_unused, wholes_of_training
from metarun.errors import UserError, nearest
from metarun.text import shell_path, shown_path

READ = ("runs", "outputs")  # the keys


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Writes the report over `config.runs`, and prints its table and where it lies; returns nothing.

    Raises `UserError` if no folder was given, one is not there, or no run in them is finished.
    """
    from metarun import report

    check_words(config, overrides)
    roots = folders(config)
    to = (roots[0] if len(roots) == 1 else Path(config.outputs)) / "report"
    if report.write(roots, to, title(roots)) is None:
        raise UserError(
            f"runs={','.join(map(shown_path, roots))}: no finished test lies there (none has a result.json of one that can be read)"
        )
    return {}


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
            key = "runs" if config.runs is not None else "outputs"
            raise UserError(f"{key}={shown_path(root)}: there is no such folder{nearest(shell_path(root), beside)}")
    return roots


def title(roots: Sequence[Path]) -> str:
    """The names of the folders."""
    return ", ".join(root.resolve().name for root in roots)
