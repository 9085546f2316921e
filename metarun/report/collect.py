"""The runs below a folder, grouped by everything that was swept except the seed."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml  # type: ignore[import-untyped]

from metarun import files
from metarun.config import flat
from metarun.config.overrides import key_of
from metarun.errors import UserError, first_line, lacks
from metarun.ops.measures import ACCURACY, ERROR
from metarun.renamed import current_choices
from metarun.report.text import count_text, more_of_task
from metarun.runs import contents
from metarun.runs.folder import FREE
from metarun.runs.result import (
    CHECKPOINT_DATA,
    CHECKPOINT_DIGEST,
    CHOICES,
    COMMAND,
    CONTENT,
    DATA,
    MEASURES,
    OVERRIDES,
    PROTOCOL,
    SCORE,
    SETS,
    TARGET,
    TARGET_ACCURACY,
    TARGET_AGREE,
    TARGET_CLASSES,
    TARGET_CURVE,
    TARGET_DIVISION,
    TARGET_OVER,
    TEST,
    TRAIN_SECONDS,
    TRAIN_STEPS,
    half_of,
    of_one,
    restored,
)
from metarun.runs.result import key as key_of_result
from metarun.text import all_printable, counted

# Overrides that say where, how often or from what, but not what was compared.
NOT_SWEPT = {"seed", "name", "outputs", "resume", "runs", "checkpoint", "recipe", *FREE}
Count = int | tuple[int, ...]  # a number, or the two ends of a range
IMAGES = {"ways": 0, "shots": 0, "queries": 0}  # in place of the test task, where images are classified and no episodes
# What values of other types, or beyond those that can be computed with, lead to.
MALFORMED = (TypeError, KeyError, ValueError, AttributeError, IndexError, ArithmeticError)
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Setting(NamedTuple):
    """What two runs must share for their test results to be compared: the same test tasks, measured alike."""

    data: str  # the choice of the group `data`
    split: str | None
    ways: Count
    shots: Count
    queries: Count
    measure: str  # acc or mse; of a run without a test what it would be
    tested: bool
    over: str  # what its interval is over: `episodes`; of a target `repeats`, or `test images` where there are none
    content: str  # the fingerprint of the images and what else decides on the test episodes
    more: str = ""  # what is unusual of the test tasks beside their sizes, in words
    one_of_many: bool = False  # whether it is one of several data sets that the same weights were tested on

    @property
    def target(self) -> bool:
        """Whether `data` is a target: `shots` are its training images and `queries` its test images, of all classes."""
        return self.over != "episodes"

    @property
    def title(self) -> str:
        """The setting in words, as the heading of a table."""
        split = f" ({self.split} split)" if self.split else ""
        if self.target:
            return f"{self.data} as the target, {self.shots} training images, {self.queries} test images{self.more}"
        if not self.ways:
            return f"{self.data}{split}, held-out images"
        if self.measure == ERROR:
            return f"{self.data}{split}, {count_text(self.shots)} points, {count_text(self.queries)} queries"
        ways, shots, queries = map(count_text, (self.ways, self.shots, self.queries))
        return f"{self.data}{split}, {ways}-way {shots}-shot, {queries} queries a class{self.more}"

    def tells(self, column: str, value: Any) -> bool:
        """Whether the title already says that `column` has this value."""
        if self.target:
            told = {"target": self.data, "target.train_images": self.shots, "target.test_images": self.queries}
            return (column in told and told[column] == value) or (
                column == "target.repeats" and self.more == _repeats(value)
            )
        known: dict[str, Any] = {"data": self.data, "data.split": self.split}
        for prefix in ("task.", "test.task."):
            known |= {f"{prefix}ways": self.ways, f"{prefix}shots": self.shots, f"{prefix}queries": self.queries}
        return column in known and known[column] == as_count(value)


def as_count(value: Any) -> Any:
    """A range that JSON or YAML gave as a list, as a tuple; any other value as it is."""
    return tuple(value) if isinstance(value, list) else value


def basis(point: Mapping[str, Any], without: str) -> str:
    """What the interval of a point of a target's learning curve is over.

    Args:
        point: The point.
        without: What it is over where the point does not say.
    """
    return "test images" if point.get("agree") else str(point.get("over") or without)


def _repeats(number: int | None) -> str:
    """The repeats of a target, to follow the numbers of its images; empty where they are not known."""
    return f", {counted(number, 'repeat')}" if number else ""


def _items(data: dict[str, Any]) -> str:
    """The fingerprint of a data set's items, whatever vectors an encoder made of them: that is how, and not on what, a run worked."""
    return str(data.get("before_encoding", data["fingerprint"]))


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as its folder tells it."""

    folder: Path
    result: dict[str, Any]
    config: dict[str, Any]  # {"train.steps": 100, ...}; its `data.*` are of what is trained on
    choices: dict[str, str]  # of Hydra's groups; for a run that only tests, those its weights were trained with
    overridden: frozenset[str]  # keys and groups named on its command line, or on that of its weights
    finished: float  # seconds since the epoch
    tested_on: str = ""  # of a test on other data than those of the training, or on several, these; the choice of `data` is the training's
    one_of_many: bool = False  # whether it is a test on several data sets, as it is of one
    test_data: dict[str, Any] = field(default_factory=dict)  # the `data.*` of such a test on other data
    # The run that trained the weights, of a run that goes on with a checkpoint, where it is there.
    origin: FinishedRun | None = None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config.get("seed") or 0)

    @property
    def elsewhere(self) -> bool:
        """Whether it was tested on other data than its weights were trained on."""
        return self.tested_on not in ("", self.choices.get("data")) or bool(self.test_data)

    def of_test(self, key: str) -> Any:
        """What the test had for a key; None if it has no such key."""
        return (self.test_data if self.test_data and key.startswith("data.") else self.config).get(key)

    @property
    def content_keys(self) -> frozenset[str]:
        """The keys, of those that were typed, that may decide on `Setting.content`."""
        of = "target." if self.tested == TARGET else "data."
        return frozenset(key for key in self.overridden if key.startswith(of))

    @property
    def tested_classes(self) -> str:
        """Which classes were tested on, in a few words, of a test on one of several data sets; of any other empty."""
        told = self.result[PROTOCOL].get(SETS, {}).get(self.tested_on, {}) if self.one_of_many else {}
        return str(told.get("classes", "")).partition(",")[0]

    @property
    def digest(self) -> str | None:
        """That of the weights that it tests and did not train."""
        return None if self.result.get(TRAIN_STEPS) else self.result.get(CHECKPOINT_DIGEST)

    @property
    def needs(self) -> list[str]:
        """The runs, or files of weights, that its command goes on with."""
        named = (key for key in self.config if key == "checkpoint" or key.rpartition(".")[2] == "from")
        return [str(self.config[key]) for key in named if self.config[key]]

    @property
    def training_seed(self) -> int | str:
        """The seed that its weights were trained with; where that is not known, their digest."""
        if self.digest is None:
            return self.seed
        if self.origin is not None:
            return self.origin.training_seed
        typed = any(key_of(word) == "seed" for word in words_of(self.result) if "=" in word)
        return self.digest if typed else self.seed  # a test has by itself the seed of the training

    @property
    def setting(self) -> Setting:
        """What another run must share for its test results to be compared with those of this one."""
        if self.tested == TARGET:
            draws = [self.config.get(f"target.{key}") for key in ("repeats", "subset_seed")]
            division = str(self.result.get(TARGET_DIVISION)).partition(":")[0]  # behind it stands how, in words
            content = [_items(self.result[CONTENT]), division, *draws]
            shots, queries = (
                int(self.result.get(key_of_result(TARGET, f"{part}_images"), 0)) for part in ("train", "test")
            )
            name = self.choices.get("target", "target")
            over = self.result.get(TARGET_OVER, "repeats" if TARGET_CURVE in self.result else "test images")
            ways = len(self.result[TARGET_CLASSES])
            more = _repeats(self.config.get("target.repeats")) if over == "repeats" else ""
            return Setting(name, None, ways, shots, queries, ACCURACY, True, over, repr(content), more)
        protocol, data = self.result[PROTOCOL], self.result[DATA]
        task = protocol.get(TEST, IMAGES)
        tested = [measure for measure in MEASURES if key_of_result(TEST, measure) in self.result]
        # A data set without classes is one of regression tasks.
        measure = tested[0] if tested else ACCURACY if "classes" in data else ERROR
        # Rotated classes and episodes within one group have the images' fingerprint, but are other episodes.
        content = [_items(data), data.get("classes"), self.of_test("data.within_group")]
        name = self.tested_on or self.choices.get("data", "data")
        return Setting(
            name,
            protocol["split"],
            as_count(task["ways"]),
            as_count(task["shots"]),
            as_count(task["queries"]),
            measure,
            bool(tested),
            "episodes",
            repr(content),
            more_of_task(task),
            self.one_of_many,
        )

    @property
    def interval_over(self) -> str:
        """What the interval of its test is over, which of repeats that all agree is not what the setting says."""
        return basis({"agree": self.result.get(TARGET_AGREE)}, self.setting.over)

    @property
    def tested(self) -> str:
        """What the names of its test's numbers begin with."""
        return TARGET if TARGET_ACCURACY in self.result else TEST

    def knows(self, column: str) -> bool:
        """Whether the run has such a group or key, be it without a value; one of another version may not."""
        return column in self.choices or column in self.config

    def value(self, column: str) -> Any:
        """What the run had for a key, or the choice for a group; None if it has no such key."""
        return self.choices[column] if column in self.choices else self.config.get(column)

    def scores(self) -> np.ndarray | None:
        """The score of every test episode after the last inner step, repeat or test image, `[n]`; None if the run left none."""
        over_images = self.tested == "target" and self.setting.over == "test images"
        name = "right" if over_images else "values"
        try:
            stored = files.read_arrays(
                self.folder / contents.scores_file(self.tested_on if self.one_of_many else ""), files.MADE_AGAIN, [name]
            )
            values: np.ndarray = stored[name] if over_images else stored[name][-1]
            return values if values.ndim == 1 else None
        except (UserError, IndexError):
            return None

    def curve(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The recorded steps and values of the first of `names` that `metrics.jsonl` has, both `[n]`, finite ones only."""
        points: dict[str, dict[int, float]] = {name: {} for name in names}
        for record in records(self.folder)[0]:
            for name in names:
                if isinstance(value := record.get(name), int | float) and np.isfinite(value):
                    points[name][record["step"]] = value
        found = next((points[name] for name in names if points[name]), {})
        return np.array(sorted(found)), np.array([found[step] for step in sorted(found)])


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


@dataclass
class Collection:
    """All that was found below the roots."""

    columns: list[str] = field(default_factory=list)  # the keys and groups that were swept
    groups: list[Group] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # a line for each file that could not be used
    total: int = 0  # the run folders, whatever became of them, without those that only used what was learned

    @property
    def runs(self) -> list[FinishedRun]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    @property
    def folders(self) -> list[FinishedRun]:
        """One of the runs of each folder, where a test on several data sets has one for each."""
        return [*{run.folder: run for run in self.runs}.values()]


def collect(roots: Sequence[Path], besides: Path, without: Mapping[Path, str] | None = None) -> Collection:
    """Every run folder below `roots`, except in the folder `besides`, and those in `without`, each of which has a reason."""
    collection, runs = Collection(), []
    for folder in run_folders(roots, besides.resolve()):
        collection.total += 1
        try:
            if not has_result(folder):
                collection.unfinished.append(folder)
                continue
            run = read(folder)
            check_usable(run)
            if without and folder in without:
                raise Unreadable(folder / contents.RESULT, without[folder])
        except NothingTested:
            collection.total -= 1
            continue
        except Unreadable as error:
            collection.problems.append(str(error))
            continue
        runs += by_set(run)
        if damage := records(folder)[1]:
            collection.problems.append(f"{folder / contents.METRICS}: {damage}")
    collection.columns = swept(runs)
    collection.columns += [column for column in crossed(runs) if column not in collection.columns]
    if unsaid := unsaid_differences(grouped(runs, collection.columns)[0]):
        collection.columns += unsaid
    collection.groups, repeated = grouped(runs, collection.columns)
    collection.problems += dict.fromkeys(repeated)  # once for all data sets of a run
    return collection


def run_folders(roots: Sequence[Path], besides: Path) -> Iterator[Path]:
    """The folders with a `config.yaml`, in the order of their names, each once; nothing is looked for inside of one.

    One that may not be looked into is among them: whoever reads it says so.
    """
    seen, waiting = set(), [root for root in reversed(roots)]
    while waiting:
        folder = waiting.pop()
        real = folder.resolve()
        if real in seen or real == besides:
            continue
        seen.add(real)
        try:
            below = None if has_file(folder, contents.CONFIG) else sorted(folder.iterdir(), reverse=True)
        except OSError:
            below = None
        if below is None:
            yield folder
        else:
            waiting += [path for path in below if not path.name.startswith(".") and os.path.isdir(path)]


def has_file(folder: Path, name: str) -> bool:
    """Whether a folder has a file of that name; raises `OSError` where the folder may not be looked into."""
    try:
        return stat.S_ISREG((folder / name).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def has_result(folder: Path) -> bool:
    """Whether the run in `folder` is finished; raises `Unreadable` where that cannot be told."""
    try:
        if has_file(folder, contents.RESULT):
            return True
        os.scandir(folder).close()  # one that may not be looked into is no unfinished run
        return False
    except OSError as error:
        raise Unreadable(folder, _why(error)) from error


def records(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines of `metrics.jsonl` of a run, and what its curves lack, in words; empty where they are whole."""
    try:
        found, damaged = (
            files.read_json_lines(folder / contents.METRICS) if has_file(folder, contents.METRICS) else ([], 0)
        )
    except OSError as error:
        return [], f"cannot be read ({_why(error)}), so that the run has no curves"
    return found, f"{counted(damaged, 'damaged line')} left out of its curves" if damaged else ""


class Unreadable(Exception):
    """A run that is left out, since a file of it cannot be read, or is not what metarun writes.

    Args:
        path: The file, or the folder.
        why: What is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: cannot be used ({why}), so that the run is left out")
        self.path = path


class NothingTested(Unreadable):
    """A run that used what an earlier one learned, and has nothing to compare."""


def read(folder: Path) -> FinishedRun:
    """The finished run in `folder`; raises `Unreadable`, with one line that names the file."""
    path = folder / contents.RESULT
    try:
        result = all_printable(restored(files.parsed(path.read_text(encoding="utf-8"))))
        needed = (PROTOCOL, COMMAND, CONTENT if TARGET_ACCURACY in result else DATA)
        missing = [key for key in needed if key not in result]
        used = missing == [DATA] and not any(result[CHOICES].get(group) for group in ("data", "target"))
        if (missing and not used) or not IMAGES.keys() <= result[PROTOCOL].get(TEST, IMAGES).keys():
            raise ValueError(f"has no {missing[0] if missing else 'test task'}")
        if not result.get(key_of_result(TEST, SETS), {}).keys() <= result[PROTOCOL].get(SETS, {}).keys():
            raise ValueError("does not say how its data sets were tested")
        result[PROTOCOL].setdefault("split", None)
        path = folder / contents.CONFIG
        text = path.read_text(encoding="utf-8")
        config = all_printable(flat(yaml.load(text, _Loader)))
        if not config.keys() - {""}:
            raise ValueError("it holds no keys")
        if not text.endswith("\n"):  # it was written whole, and so ended its last line
            raise ValueError("it was cut off")
        if used:
            raise NothingTested(folder, "it tested nothing")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
        found = files.damage(path) if isinstance(error, ValueError | yaml.YAMLError) and path.is_file() else ""
        raise Unreadable(path, found if "zero" in found or "empty" in found else _why(error)) from error
    try:
        stored = current_choices(result.get(CHOICES, {}))
        chosen = {group: choice for group, choice in stored.items() if choice is not None}
        choices = {**_classes(config), **chosen}
        typed = overridden(words_of(result), config, choices)
        run = FinishedRun(folder, result, config, choices, frozenset(typed), (folder / contents.RESULT).stat().st_mtime)
        # The choices of the command line of a test are not what the weights were trained with.
        return _trained_with(run) if config.get("checkpoint") else run
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise Unreadable(folder / contents.RESULT, _why(error)) from error


def _why(error: Exception) -> str:
    """What is wrong with a file, by the error that reading it led to."""
    return error.strerror or str(error) if isinstance(error, OSError) else first_line(error)


def by_set(run: FinishedRun) -> list[FinishedRun]:
    """A run that was tested on several data sets as one for each of them; any other as it is."""
    sets = run.result.get(key_of_result(TEST, SETS), {})
    return [replace(run, result=of_one(run.result, name), tested_on=name, one_of_many=True) for name in sets] or [run]


def check_usable(run: FinishedRun) -> None:
    """Checks that a run has what a report takes from it, so that a bad one never ends the report on the others.

    Raises:
        Unreadable: It does not.
    """
    path = run.folder / contents.RESULT
    try:
        hash(run.setting)
        numbers = [run.seed, *(run.result.get(key, 0.0) for key in (TRAIN_SECONDS, TRAIN_STEPS, SCORE))]
        kinds = [key_of_result(run.tested, measure) for measure in MEASURES]
        numbers += [run.result.get(key) or 0.0 for kind in kinds for key in (kind, half_of(kind))]
    except MALFORMED as error:
        raise Unreadable(path, lacks(error)) from error
    if wrong := [number for number in numbers if not isinstance(number, int | float)]:
        raise Unreadable(path, f"{str(wrong[0])[:40]!r} is no number")


def words_of(result: dict[str, Any]) -> list[str]:
    """The overrides that a result stores; of one by version 0.1, which has only the command, the words of that."""
    if OVERRIDES in result:
        return [str(word) for word in result[OVERRIDES]]
    try:
        return shlex.split(result[COMMAND])
    except ValueError:  # an apostrophe
        return str(result[COMMAND]).split()


def overridden(words: Sequence[str], config: dict[str, Any], choices: dict[str, str]) -> set[str]:
    """The groups and the single keys that these words override."""
    named = {key_of(word) for word in words if "=" in word}
    groups = named & choices.keys()
    keys = {
        key for key in config for name in named if key == name or (key.startswith(f"{name}.") and name not in groups)
    }
    return groups | keys


def _trained_with(run: FinishedRun) -> FinishedRun:
    """A run that goes on with a checkpoint, with the choices, the data and the overrides of the run that trained the weights.

    Without that run the choices are the classes that the config names, and other data of the training are called by their fingerprint.
    """
    checkpoint, typed, before = Path(run.config["checkpoint"]), run.overridden, _trained_on(run.result)
    trained = _origin(run.folder, checkpoint)
    if trained is not None:
        here = run.choices.get("data", "")
        choices = {**trained.choices, **{group: run.choices[group] for group in typed & run.choices.keys() - {"data"}}}
        run = replace(run, choices=choices, overridden=typed | trained.overridden, origin=trained)
        of_training, now = trained.config, here if "data" in typed else trained.choices.get("data", "")
    else:
        classes = _classes(run.config)
        now = run.choices.get("data", "") if "data" in typed else classes.get("data", "")
        other = {"data": f"data {before[:8]}"} if before else {}
        run = replace(run, choices={**run.choices, **classes, **other}, overridden=typed | classes.keys())
        of_training = {}
    if DATA not in run.result or not (before or (trained is not None and now != run.choices.get("data", ""))):
        return run
    own = {key: value for key, value in run.config.items() if key.startswith("data.")}
    config = {key: value for key, value in run.config.items() if key not in own}
    config |= {key: value for key, value in of_training.items() if key.startswith("data.")}
    return replace(run, config=config, tested_on=now, test_data=own)


def _origin(folder: Path, checkpoint: Path) -> FinishedRun | None:
    """The run that trained the weights of `checkpoint`, as far as it is there and is not the one in `folder` itself."""
    try:
        trained = checkpoint if checkpoint.is_dir() else checkpoint.parent
        if not has_result(trained) or trained.resolve() == folder.resolve():
            return None
        return read(trained)
    except (OSError, Unreadable):
        return None


def _trained_on(result: dict[str, Any]) -> str:
    """The fingerprint of the items that the weights of a test were trained on, where it is not on these; else empty."""
    before = result.get(CHECKPOINT_DATA, {}).get("data")
    return _items(before) if before and _items(before) != _items(result.get(DATA, before)) else ""


def _classes(config: dict[str, Any]) -> dict[str, str]:
    """The class of each group that has one: its name where the choice is not known."""
    targets = {key.removesuffix("._target_"): str(value) for key, value in config.items() if key.endswith("._target_")}
    return {group: target.rpartition(".")[2] for group, target in targets.items()}


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
