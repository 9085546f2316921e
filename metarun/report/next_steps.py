"""The commands that somebody is likely to want after a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from metarun.core import TaskShape
from metarun.data.varied import shortage
from metarun.ops.measures import ACCURACY
from metarun.runs import contents, result
from metarun.text import shell_path


def next_steps(folder: Path, found: dict[str, Any]) -> list[str]:
    """One or two commands that can be pasted.

    Args:
        folder: The folder of a finished run.
        found: What its `result.json` holds.
    """
    learner = found.get(result.LEARNER)
    metarun, run = result.begun(found), f"checkpoint={shell_path(folder)}"
    if learner is None:  # regression, or predictions
        return [f"{metarun} recipe=report runs={shell_path(folder.parent)}"] if result.tested(found) else []
    classified, support = (
        ("items=FILE", "support=FILE") if "item" in learner["preprocessing"] else ("images=FOLDER", "support=FOLDER")
    )
    if (folder / contents.CLASSIFIER).is_file():
        return [
            f"{metarun} recipe=predict {run} {classified}",
            f"{metarun} recipe=report runs={shell_path(folder.parent)}",
        ]
    steps = [f"{metarun} recipe=predict {run} {support} {classified}"]
    task = found.get(result.PROTOCOL, {}).get("test")
    plain = task and isinstance(task["shots"], int)
    if result.key(result.TEST, ACCURACY) in found and plain and not learner["weights"]:
        shots = _other_shots(task, _tested_on(task, found))
        return [*steps, f"{metarun} recipe=test {run} test.task.shots={shots}"] if shots else steps
    return steps if result.tested(found) else [f"{metarun} recipe=test {run}", *steps]


Tested = tuple[dict[str, Any], dict[str, Any]]  # tasks, and what `result.json` says of the data that they were of


def _tested_on(task: dict[str, Any], found: dict[str, Any]) -> list[Tested]:
    """What was tested on: of several data sets each, but for those that have shots of their own, whatever `test.task.shots` is."""
    sets = found.get(result.key(result.TEST, result.SETS))
    if not sets:
        return [(task, found.get(result.DATA, {}))]
    own = {name: told["task"] for name, told in found[result.PROTOCOL][result.SETS].items()}
    return [(own[name], data) for name, data in sets.items() if own[name]["shots"] == task["shots"]]


def _other_shots(task: dict[str, Any], tested: Sequence[Tested]) -> int | None:
    """A number of shots that the test classes have images for as well; None where none is known to be.

    Args:
        task: The shape of the test tasks.
        tested: The tasks of each data set that was tested on, and the classes and images of each split of it.
    """
    if not tested:
        return None
    if task["shots"] > 1:
        return 1
    return 5 if all(_can_serve(own, 5, data) for own, data in tested) else None


def _can_serve(task: dict[str, Any], shots: int, data: dict[str, Any]) -> bool:
    """Whether the test classes of a data set have images for tasks of so many shots; so they are where nothing is said of them."""
    smallest = data.get("images_of_smallest_class", {}).get("test")
    if smallest is None:
        return not data
    known: dict[str, Any] = {item.name: task[item.name] for item in fields(TaskShape) if item.name in task}
    known |= {name: tuple(size) for name, size in known.items() if isinstance(size, list)}
    return shortage(TaskShape(**{**known, "shots": shots}), np.array([smallest])) is None
