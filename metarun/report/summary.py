"""The numbers of a report: a section for each setting, a row for each group, each row held against the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from metarun.ops.measures import ACCURACY, ERROR
from metarun.report import published, statistics
from metarun.report.collect import Collection
from metarun.report.finished import FinishedRun, Setting, basis
from metarun.report.grouping import Group, natural
from metarun.report.published import Published
from metarun.report.statistics import Paired
from metarun.runs.result import (
    PROTOCOL,
    SCORE,
    TARGET,
    TARGET_CURVE,
    TEST_DIVERGED,
    TEST_MEDIAN,
    half_of,
    key,
)
from metarun.text import printable


@dataclass
class Row:
    """A group in numbers. Accuracies and validation scores of classification are in [0, 1]; a memory is in bytes."""

    group: Group
    label: str
    # Over seeds of the training, of the test measure, where finite; None if nothing was tested.
    mean: float | None = None
    seeds_half: float | None = None  # of the 95% interval over seeds; None for one seed, and for seeds that all agree
    episodes_half: float | None = None  # of the 95% interval over the test episodes of these weights; None of too few
    over: str = ""  # what that interval is over
    median: float | None = None  # of the errors of regression, the mean over seeds
    counted: int = 0  # the trainings that the mean is of, or the mean validation score where nothing was tested
    diverged: int | None = None  # test tasks of regression, of all seeds
    validation: float | None = None  # mean over seeds; higher is better
    validation_half: float | None = None
    seconds: float | None = None  # of all training stages, mean over seeds
    memory: float | None = None  # peak, on the device if that is a GPU; mean over seeds
    best: bool = False  # several may be, which are equal; the first of them is what the others are held against
    on_episodes: Paired | None = None  # this minus the best, over the episodes that both were tested on
    on_seeds: Paired | None = None  # this minus the best, over the seeds that both have
    published: Published | None = None

    @property
    def n(self) -> int:
        """The number of trainings."""
        return len(self.group.trainings)


@dataclass
class Section:
    """Groups that can be compared, since they were tested (or are validated) on the same tasks."""

    setting: Setting
    title: str
    columns: list[str]  # those that the title does not tell
    rows: list[Row] = field(default_factory=list)
    # Whether other sections differ from this one in the data alone, as divisions of one data set do.
    division: bool = False
    # Whether the report has tests on other data than those of the training, so that no title tells these.
    crossed: bool = False

    @property
    def higher_is_better(self) -> bool:
        """Whether the best row is the one with the largest number."""
        return self.setting.measure == ACCURACY or not self.setting.tested


def summarise(collection: Collection) -> list[Section]:
    """The sections; p-values are Holm-adjusted over all comparisons of their kind in the report."""
    sections = []
    crossed = any(run.elsewhere for run in collection.runs)
    for setting, number, told in _divisions(collection):
        groups = [group for group in collection.groups if group.setting == setting]
        columns = [
            column
            for column in collection.columns
            if column not in told
            and (
                (crossed and column.partition(".")[0] == "data")
                or not all(
                    setting.tells(column, group.values[column]) or group.values[column] is None for group in groups
                )
            )
        ]
        section = Section(setting, setting.title + number, columns, division=bool(number), crossed=crossed)
        section.rows = [_row(group, _telling(groups, columns)) for group in groups]
        if setting.tested:
            _against_the_best(section)
        else:
            section.rows.sort(key=lambda row: -math.inf if row.validation is None else row.validation, reverse=True)
            for row in section.rows:
                best = section.rows[0].validation
                row.best = (
                    row.validation is not None and best is not None and bool(statistics.tied(row.validation, best))
                )
        sections.append(section)
    _adjust([row for section in sections for row in section.rows])
    return sections


def _divisions(collection: Collection) -> list[tuple[Setting, str, list[str]]]:
    """The settings, with what the title of each has to add where several differ in their data alone, and the columns that it tells.

    What tells them apart are the classes, where one of several data sets was tested on others of them; else a key that decides on the
    test's images and that has one value in each of them and another in every other; else they are numbered.
    """
    families: dict[Setting, dict[Setting, list[Group]]] = {}
    for group in collection.groups:
        families.setdefault(group.setting._replace(content=""), {}).setdefault(group.setting, []).append(group)
    divided = [
        _Division([run for group in groups for run in group.runs] for groups in family.values())
        for family in families.values()
    ]
    used = {division.naming for division in divided} - {None}
    found: list[tuple[Setting, str, list[str]]] = []
    for family, division in zip(families.values(), divided, strict=True):
        naming = next((key for key in division.told if key in used), None) if len(family) == 1 else division.naming
        if division.classes and len(family) > 1:
            found += [(setting, f", {of}", []) for setting, of in zip(family, division.classes, strict=True)]
        elif naming is not None:
            runs = {setting: groups[0].runs[0] for setting, groups in family.items()}
            ordered = sorted(family, key=lambda setting: natural(runs[setting].of_test(naming)))
            names = _without_common_folders([shown(runs[setting].of_test(naming)) for setting in ordered])
            key = naming.removeprefix("target.").removeprefix("data.")
            told = division.told
            found += [(setting, f", {key} {name}", told) for setting, name in zip(ordered, names, strict=True)]
        elif len(family) == 1:
            found += [(setting, "", []) for setting in family]
        else:
            found += [(setting, f", data {number}", []) for number, setting in enumerate(family, 1)]
    return found


class _Division:
    """What tells settings that differ in their data alone apart.

    Attributes:
        classes: Those that each was tested on, in words; empty where these do not tell them apart.
        naming: A key that has one value in each of them and another in every other; None where there is none, or one setting.
        told: All keys that have one value in each of them, and are not of other data that were trained on.
    """

    def __init__(self, settings: Iterable[Sequence[FinishedRun]]) -> None:
        settings = list(settings)
        self.classes = self._apart([[run.tested_classes for run in runs] for runs in settings])
        keys = sorted({key for runs in settings for run in runs for key in run.content_keys})
        values = {key: [[run.of_test(key) for run in runs] for runs in settings] for key in keys}
        named = (key for key in keys if len(settings) > 1 and self._apart(values[key]))
        self.naming = next(named, None)
        self.told = [
            key
            for key, each in values.items()
            if all(len({*map(repr, of_one)}) == 1 for of_one in each)
            and all(run.value(key) == run.of_test(key) for runs in settings for run in runs)
        ]

    @staticmethod
    def _apart(values: Sequence[Sequence[Any]]) -> list[Any]:
        """The one value of each setting, where they are all different; else empty."""
        first = [of_one[0] for of_one in values]
        constant = all(len({*map(repr, of_one)}) == 1 for of_one in values)
        return first if constant and len({*map(repr, first)}) == len(first) else []


def _without_common_folders(names: Sequence[str]) -> list[str]:
    """Paths without the folders in which all of them lie; other names as they are."""
    parts = [name.split("/") for name in names]
    common = 0
    while all(len(each) > common + 1 for each in parts) and len({each[common] for each in parts}) == 1:
        common += 1
    return ["/".join(each[common:]) for each in parts]


def _telling(groups: Sequence[Group], columns: list[str]) -> list[str]:
    """The columns that tell groups apart: those with several values, if these suffice; else those, too, that some lack."""
    values = {column: {repr(group.values[column]) for group in groups} for column in columns}
    varying = [column for column in columns if len(values[column]) > 1]
    several = [column for column in varying if len(values[column] - {repr(None)}) > 1]
    told = {tuple(repr(group.values[column]) for column in several) for group in groups}
    return (several if len(told) == len(groups) else varying) or columns


def _row(group: Group, columns: Sequence[str]) -> Row:
    measure, runs = group.setting.measure, group.runs
    row = Row(group, label(group, columns))
    if group.setting.tested:
        tested = key(runs[0].tested, measure)
        found = [[run for run in together if math.isfinite(run.result[tested])] for together in group.trainings]
        finite = [together for together in found if together]
        values = [fmean(run.result[tested] for run in together) for together in finite]
        row.counted = len(values)
        if values:
            row.mean, row.seeds_half = fmean(values), statistics.over_seeds(values)
            row.episodes_half = _over_draws(finite, tested, group.setting.target)
            row.over = _bases(run.interval_over for together in finite for run in together)
        if measure == ERROR:
            # Infinite where most tasks of one diverged, or all of them, whose mean is none.
            row.median = fmean(fmean(run.result[TEST_MEDIAN] for run in together) for together in group.trainings)
            row.diverged = sum(run.result[TEST_DIVERGED] for run in runs)
    scores = _finite(_mean(run.result.get(SCORE) for run in together) for together in group.trainings)
    row.validation, row.validation_half = _mean(scores), statistics.over_seeds(scores)
    if not group.setting.tested:
        row.counted = len(scores)
    row.seconds = _mean(run.train_seconds for run in runs)
    memories = [run.result.get("peak_memory", {}) for run in runs]
    row.memory = _mean(memory.get("cuda", memory.get("host")) for memory in memories)
    setting = group.setting
    if setting.tested and not setting.target and not runs[0].elsewhere:
        row.published = published.find(runs[0].choices, runs[0].result[PROTOCOL]["test"])
    return row


def _over_draws(trainings: Sequence[Sequence[FinishedRun]], tested: str, target: bool) -> float | None:
    """Half the interval over what was drawn for the tests, of the mean over trainings of the mean over the tests of each."""
    runs = [(run, 1 / len(together)) for together in trainings for run in together]
    halves = [run.result.get(half_of(tested)) for run, _ in runs]
    # The images of a target are drawn by `target.subset_seed`.
    draws = [None if target else run.seed for run, _ in runs]
    return statistics.over_episodes(halves, draws, [share / len(trainings) for _, share in runs])


def _bases(found: Iterable[str]) -> str:
    """What the intervals of several runs are over: of some over one thing and of others over another, both."""
    return " and ".join(sorted({*found}))


class Point(NamedTuple):
    """The mean accuracy with a number of training images of a target, half its 95% interval, and what this is over."""

    mean: float
    half: float | None
    over: str


def target_points(group: Group) -> dict[int, Point]:
    """The points of each number of training images that all runs have, their intervals for these weights.

    Several tests of the same weights are one seed, of which it is the mean.
    """
    trainings = [
        [{point["train_images"]: point for point in run.result.get(TARGET_CURVE, ())} for run in together]
        for together in group.trainings
    ]
    curves = [curve for together in trainings for curve in together]
    over = statistics.over_same_draws
    return {
        size: Point(
            fmean(fmean(curve[size][ACCURACY] for curve in together) for together in trainings),
            over([over([curve[size].get(half_of(ACCURACY)) for curve in together]) for together in trainings]),
            _bases(basis(curve[size], group.setting.over) for curve in curves),
        )
        for size in sorted(set.intersection(*map(set, curves)))
    }


def target_measure(group: Group, measure: str) -> Point:
    """The mean of a measure of a target at its largest number of training items, as `target_points` has the accuracy."""
    over, name = statistics.over_same_draws, key(TARGET, measure)
    return Point(
        fmean(fmean(run.result[name] for run in together) for together in group.trainings),
        over([over([run.result.get(half_of(name)) for run in together]) for together in group.trainings]),
        _bases(run.interval_over for run in group.runs),
    )


def label(group: Group, columns: Sequence[str]) -> str:
    """The group in a few words: the choices of groups, and keys by their last name; without those that it does not have."""
    words = [
        shown(group.values[column])
        if "." not in column
        else f"{column.rpartition('.')[2]} {shown(group.values[column])}"
        for column in columns
        if group.values[column] is not None
    ]
    choices = group.runs[0].choices
    return ", ".join(words) or choices.get("algo") or choices.get("transfer") or "all runs"


def joint_labels(sections: Sequence[Section]) -> dict[int, str]:
    """The labels of the rows of several sections, by their `id`: groups of the same values have the same, others another."""
    columns = list(dict.fromkeys(column for section in sections for column in section.columns))
    rows = [row for section in sections for row in section.rows]
    groups = {tuple(repr(row.group.values[column]) for column in columns): row.group for row in rows}
    telling = _telling([*groups.values()], columns)
    return {id(row): label(row.group, telling) for row in rows}


def shown(value: object) -> str:
    """A config's value as it is typed, `–` for one that a run does not have."""
    if value is None or isinstance(value, bool):
        return "–" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else printable(str(value).replace("'", ""))


def apart(titles: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parts between commas that all of several titles share, and what is left of each without them."""
    parts = [title.split(", ") for title in titles]
    common = [part for part in parts[0] if all(part in others for others in parts)] if len(parts) > 1 else []
    return common, [", ".join(part for part in each if part not in common) for each in parts]


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Iterable[float | None]) -> float | None:
    finite = _finite(values)
    return fmean(finite) if finite else None


def _against_the_best(section: Section) -> None:
    rows = [row for row in section.rows if row.mean is not None]
    if not rows:
        return
    sign = 1 if section.higher_is_better else -1
    most = max(sign * (row.mean or 0.0) for row in rows)
    best = next(row for row in rows if statistics.tied(sign * (row.mean or 0.0), most))
    scores = {id(run): run.scores() for row in rows for run in row.group.runs} if len(rows) > 1 else {}
    for row in rows:
        row.best = bool(statistics.tied(row.mean or 0.0, best.mean or 0.0))
        if row is not best:
            by_seed = differences(row.group.runs, best.group.runs, scores)
            drawn = pooled(by_seed, row.group.setting.target) if by_seed else np.empty(0)
            row.on_episodes = statistics.paired(drawn, best.group.runs[0].overlap)
            row.on_seeds = statistics.paired(np.array(_of_seeds(row.group.runs, best.group.runs, scores)))


def pooled(by_seed: Sequence[np.ndarray], same_draws: bool) -> np.ndarray:
    """Differences of all seeds on what was drawn: one for each draw, which is another for each seed or is the same for all."""
    if not same_draws:
        return np.concatenate(by_seed)
    n = min(map(len, by_seed))
    found: np.ndarray = np.mean([each[:n] for each in by_seed], axis=0)
    return found


def differences(
    ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun], scores: Mapping[int, np.ndarray | None]
) -> list[np.ndarray]:
    """For each seed of a test that both have, our scores minus theirs on the episodes that both were tested on, where finite.

    Test episode i depends on the seed and i alone (and on the setting, which is the same): both have the first ones. Of several
    weights that were tested by one seed it is the mean.
    """
    found = []
    for seed in dict.fromkeys(run.seed for run in ours):
        mine, its = ([scores[id(run)] for run in runs if run.seed == seed] for runs in (ours, theirs))
        known = [each for each in (*mine, *its) if each is not None]
        if its and len(known) == len(mine) + len(its):
            n = min(map(len, known))
            mean, other = (np.mean([each[:n] for each in of_one if each is not None], axis=0) for of_one in (mine, its))
            both = np.isfinite(mean) & np.isfinite(other)
            found.append(mean[both] - other[both])
    return [each for each in found if len(each)]


def _of_seeds(
    ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun], scores: Mapping[int, np.ndarray | None]
) -> list[float]:
    """For each seed of a training that both have, the mean of our scores minus theirs on the episodes that both were tested on."""
    found = []
    for seed in dict.fromkeys(run.training_seed for run in ours):
        mine, its = ([run for run in runs if run.training_seed == seed] for runs in (ours, theirs))
        if by_draw := differences(mine, its, scores):
            found.append(fmean(float(each.mean()) for each in by_draw))
    return found


def _adjust(rows: list[Row]) -> None:
    """Puts Holm's p-values in the place of those of the single tests, over episodes and over seeds apart."""
    for name in ("on_episodes", "on_seeds"):
        tested = [row for row in rows if getattr(row, name)]
        for row, p in zip(tested, statistics.holm([getattr(row, name).p for row in tested]), strict=True):
            setattr(row, name, getattr(row, name)._replace(p=p))
