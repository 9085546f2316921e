"""The sentences that the terminal and the page share."""

from __future__ import annotations

from typing import Any

from metarun.core import TaskShape
from metarun.data.source import Split
from metarun.report.text import task_text
from metarun.text import counted, duration


def asked(one: dict[str, Any], tasks: dict[Split, TaskShape]) -> list[str]:
    """Whether the tasks of the config fit each split; nothing of a data set that they are not drawn from, as a target."""
    found = []
    for split, told in one["splits"].items():
        if (reason := told["asked"]) is None:
            continue
        task = tasks[split]
        found.append(f"{split}: {task_text(task.describe())} {'does not fit: ' + reason if reason else 'fits'}")
    return found


def class_line(one: dict[str, Any]) -> str:
    """The classes of a target, and how many items they have."""
    sizes = one["sizes"]
    least, most = f"{sizes['smallest']:,}", f"{sizes['largest']:,}"
    return (
        f"{sizes['classes']:,}, of {least if least == most else f'{least} to {most}'} items, {sizes['items']:,} in all"
    )


def text_lines(told: dict[str, Any] | None) -> list[str]:
    """What was found of texts."""
    if told is None:
        return []
    found = [f"{told['median_words']:.0f} words each (median), {told['most_words']:,} at most"]
    for key, what in (
        ("repeated", "that their class has already"),
        ("repeated_in_a_later_split", "that a later split has too"),
    ):
        if told[key]:
            found.append(f"left out: {told[key]:,} {what}")
    return found


def duplicate_lines(told: dict[str, Any] | None) -> list[str]:
    """What was found of images that are there twice."""
    if told is None:
        return []
    found = []
    for kind, what in (("exact", "the same in every pixel"), ("near", "nearly the same")):
        count = told[kind]
        across = told[f"{kind}_across"].items()
        beyond = ", ".join(f"{n:,} of them in another of the {way}" for way, n in across) or "nothing divides them"
        found.append(
            f"{counted(count, 'image')} {'has' if count == 1 else 'have'} a twin that is {what}"
            + (f"; {beyond}" if count else "")
        )
    if told["other_class"]:
        found.append(f"{told['other_class']:,} of these have their twin in another class")
    if told["crowded"]:
        found.append("so many images look alike in part that not all pairs were compared")
    return found


def time_lines(time: dict[str, Any]) -> list[str]:
    """How long the training would take."""
    if "problem" in time:
        return [f"time     not measured: {time['problem']}"]
    rest = "validation and test not timed"
    if time["test_seconds"] is not None:
        rest = f"validation {duration(time['validation_seconds'])}, test {duration(time['test_seconds'])}"
    before = f"encoding {duration(time['encoding_seconds'])}, " if time.get("encoding_seconds") else ""
    return [
        f"time     about {duration(time['seconds'])} here: {before}{time['steps']:,} steps of {time['step_seconds']:.3g} s "
        f"({duration(time['train_seconds'])}), {rest}; by {time['timed_steps']} steps timed on {time['hardware']}"
    ]
