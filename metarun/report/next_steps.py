"""The commands that somebody is likely to want after a run."""

from __future__ import annotations

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
        shots = _other_shots(task, found.get(result.DATA, {}))
        return [*steps, f"{metarun} recipe=test {run} test.task.shots={shots}"] if shots else steps
    return steps if result.tested(found) else [f"{metarun} recipe=test {run}", *steps]


def _other_shots(task: dict[str, Any], data: dict[str, Any]) -> int | None:
    """A number of shots that the test classes have images for as well; None where none is known to be.

    Args:
        task: The shape of the test tasks.
        data: What `result.json` says of the data: the classes and images of each split.
    """
    if task["shots"] > 1:
        return 1
    smallest = data.get("images_of_smallest_class", {}).get("test")
    if smallest is None:
        return None if data else 5
    known: dict[str, Any] = {item.name: task[item.name] for item in fields(TaskShape) if item.name in task}
    known |= {name: tuple(size) for name, size in known.items() if isinstance(size, list)}
    return 5 if shortage(TaskShape(**{**known, "shots": 5}), np.array([smallest])) is None else None
