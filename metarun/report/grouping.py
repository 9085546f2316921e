"""Runs in groups: those that differ in their seed alone, in the order of what was swept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metarun.report.finished import NOT_SWEPT, FinishedRun, Setting


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone: in that of the training, or in that of the test."""

    setting: Setting
    values: dict[str, Any]  # of each column
    trainings: list[list[FinishedRun]]  # by seed, the runs of the same weights together, one for each seed of a test

    @property
    def runs(self) -> list[FinishedRun]:
        """The runs of all trainings."""
        return [run for together in self.trainings for run in together]


def swept(runs: Sequence[FinishedRun]) -> list[str]:
    """The overridden keys and groups whose values differ among the runs: groups first, then keys, both as typed mostly."""
    typed = {key for run in runs for key in run.overridden} - NOT_SWEPT
    differing = [key for key in typed if len({repr(run.value(key)) for run in runs}) > 1]
    first = ("data", "algo", "backbone")
    differing = [key for key in differing if not key.startswith("test.data.")]  # settings tell which data set it is
    return sorted(
        differing, key=lambda key: (key not in first, "." in key, first.index(key) if key in first else 0, key)
    )


def crossed(runs: Sequence[FinishedRun]) -> list[str]:
    """What says on which data the weights were trained, where some were tested on others and no setting says on which of several."""
    across = [run for run in runs if run.elsewhere and not run.one_of_many]
    keys = {
        key
        for run in across
        if run.tested_on == run.choices.get("data")
        for key in run.overridden
        if key.startswith("data.") and run.config.get(key) != run.of_test(key)
    }
    return ["data", *sorted(keys)] if across else []


def recipes(runs: Sequence[FinishedRun], columns: Sequence[str]) -> list[str]:
    """`recipe`, where runs that are alike in `columns` were trained by several: with a source and without one, say."""
    found: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        if run.digest is None and (recipe := run.choices.get("recipe")):
            alike = (run.setting, *(repr(run.value(column)) for column in columns))
            found.setdefault(alike, set()).add(recipe)
    return ["recipe"] if any(len(each) > 1 for each in found.values()) else []


def unsaid_differences(groups: Sequence[Group]) -> list[str]:
    """Keys that differ within a group though no command names them, as when a config file was edited between two runs."""
    found = set()
    for group in groups:
        first, *others = [run.config for run in group.runs]
        for other in others:
            found |= {key for key in {*first, *other} if _differ(first, other, key)}
    return sorted(key for key in found - NOT_SWEPT if not key.startswith("recipe."))


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    """Whether two configs differ in a key; one that only one of them knows is of another version, and is none while it is off."""
    if key in one and key in other:
        return bool(one[key] != other[key])
    return bool(one.get(key) or other.get(key))


def grouped(runs: Sequence[FinishedRun], columns: Sequence[str]) -> tuple[list[Group], list[str]]:
    """The groups, by setting and values; and a line for each run that another of the same group and seeds replaces."""
    members: dict[tuple[Any, ...], list[FinishedRun]] = {}
    off = {column: _off(runs, column) for column in columns}
    for run in runs:
        values = (repr(run.value(column)) if run.knows(column) else off[column] for column in columns)
        members.setdefault((run.setting, *values), []).append(run)
    groups, repeated = [], []
    for together in members.values():
        latest: dict[tuple[int | str, int], FinishedRun] = {}
        weights = dict(zip(map(id, together), _weights(together), strict=True))
        for run in sorted(together, key=lambda run: (run.finished, str(run.folder))):
            seeds = run.training_seed, run.seed
            if seeds in latest:
                earlier = latest[seeds]
                how = "has the same settings and seed"
                if (earlier.digest or run.digest) and weights[id(earlier)] != weights[id(run)]:
                    how = "tests other weights by the same settings and seed"
                repeated.append(f"{earlier.folder}: left out, {run.folder} {how}, and is later")
            latest[seeds] = run
        by_seed = [latest[seeds] for seeds in sorted(latest, key=lambda seeds: [*map(natural, seeds)])]
        known = {column: [value for run in by_seed if (value := run.value(column)) is not None] for column in columns}
        told = {column: values[0] if values else None for column, values in known.items()}
        groups.append(Group(by_seed[0].setting, told, _trainings(by_seed)))
    groups.sort(key=_place)
    return groups, repeated


def _off(runs: Sequence[FinishedRun], column: str) -> str:
    """What a run that has no such key is taken to have: the value that is off, where runs of a version that knows the key have one."""
    off = {repr(value) for run in runs if not (value := run.value(column)) and value is not None}
    return off.pop() if len(off) == 1 else repr(None)


def _trainings(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """The runs of the same weights together: those that tested them, and the one that trained them."""
    found: dict[str, list[FinishedRun]] = {}
    for run, weights in zip(runs, _weights(runs), strict=True):
        found.setdefault(weights, []).append(run)
    return list(found.values())


def _weights(runs: Sequence[FinishedRun]) -> list[str]:
    """What the weights of each run are known by: their digest, where a run tested them, else the folder of their training."""
    tested = {run.origin.folder.resolve(): run.digest for run in runs if run.origin and run.digest}
    return [run.digest or tested.get(run.folder.resolve()) or str(run.folder.resolve()) for run in runs]


def _place(group: Group) -> tuple[Any, ...]:
    return (not group.setting.tested, *map(natural, group.setting), *map(natural, group.values.values()))


def natural(value: Any) -> tuple[int, int | float, str]:
    """Sorts numbers by size and before words, which go by the alphabet."""
    if isinstance(value, int | float):
        return (0, value, "")
    return (1, 0.0, str(value))
