"""A finished run as a report sees it: its setting, its numbers and its curves."""

from __future__ import annotations

import math
import shlex
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarun import files
from metarun.config.overrides import key_of
from metarun.errors import UserError, first_line
from metarun.ops.measures import ACCURACY, ERROR
from metarun.report.target import items_of_data, kind, overlap
from metarun.report.text import count_text, more_of_task
from metarun.runs import contents
from metarun.runs.folder import FREE
from metarun.runs.result import (
    CHECKPOINT_DIGEST,
    COMMAND,
    CONTENT,
    CONTINUAL,
    DATA,
    MEASURES,
    OVERRIDES,
    PROTOCOL,
    SECONDS,
    SETS,
    STAGES,
    TARGET,
    TARGET_ACCURACY,
    TARGET_AGREE,
    TARGET_CLASSES,
    TARGET_CURVE,
    TARGET_DIVISION,
    TARGET_OVER,
    TEST,
    TRAIN,
    TRAIN_STEPS,
)
from metarun.runs.result import key as key_of_result
from metarun.text import counted

# Overrides that say where, how often or from what, but not what was compared.
NOT_SWEPT = {"seed", "name", "outputs", "resume", "runs", "checkpoint", "recipe", *FREE}
WITHIN = ("within_alphabet", "within_script")  # the keys of data sets that draw all ways of a task from one group
Count = int | tuple[int, ...]  # a number, or the two ends of a range
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
IMAGES = {"ways": 0, "shots": 0, "queries": 0}  # in place of the test task, where images are classified and no episodes


class Setting(NamedTuple):
    """What two runs must share for their test results to be compared: the same test tasks, measured alike."""

    data: str  # the choice of the group `data`
    split: str | None
    ways: Count
    shots: Count
    queries: Count
    measure: str  # acc or mse; of a run without a test what it would be
    tested: bool
    # What its interval is over: `episodes`; `orders` of classes that arrive one after the other; of a target `repeats`, or `test images`
    # where there are none.
    over: str
    content: str  # the fingerprint of the images and what else decides on the test episodes
    more: str = ""  # what is unusual of the test tasks beside their sizes, in words
    one_of_many: bool = False  # whether it is one of several data sets that the same weights were tested on
    items: str = "images"  # what those of the data are called: `images` or `texts`

    @property
    def target(self) -> bool:
        """Whether `data` is a target: `shots` are its training images and `queries` its test images, of all classes."""
        return self.over in ("repeats", "test images")

    @property
    def title(self) -> str:
        """The setting in words, as the heading of a table."""
        split = f" ({self.split} split)" if self.split else ""
        if self.target:
            # None of what trains on the whole target, or on none of it.
            learned = f"{self.shots} training {self.items}, " if self.shots else ""
            return f"{self.data} as the target, {learned}{self.queries} test {self.items}{self.more}"
        if not self.ways:
            return f"{self.data}{split}, held-out {self.items}"
        if self.measure == ERROR:
            return f"{self.data}{split}, {count_text(self.shots)} points, {count_text(self.queries)} queries"
        ways, shots, queries = map(count_text, (self.ways, self.shots, self.queries))
        if self.over == "orders":
            return f"{self.data}{split}, {ways} classes one after the other, {shots} {self.items} each, {queries} to test{self.more}"
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


def items_of(data: dict[str, Any]) -> str:
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
    def saw_these_classes(self) -> str:
        """Whether what its encoder or its backbone was pretrained on has classes that are tested on: `yes`, `no` or `not known`."""
        protocol = self.result[PROTOCOL]
        whole = protocol.get("encoder") or protocol.get("backbone") or {}
        of_set = protocol.get(SETS, {}).get(self.tested_on, {}) if self.one_of_many else {}
        return str({**whole, **of_set}.get("saw_these_classes", "no"))

    @property
    def digest(self) -> str | None:
        """That of the weights that it tests and did not train."""
        return None if self.result.get(TRAIN_STEPS) else self.result.get(CHECKPOINT_DIGEST)

    @property
    def train_seconds(self) -> float | None:
        """The seconds of all its trainings, that of an earlier stage too; None where it trained nothing."""
        seconds = [self.result.get(key_of_result(stage, SECONDS)) for stage in {TRAIN, *self.result.get(STAGES, {})}]
        known = [each for each in seconds if each is not None]
        return math.fsum(known) if known else None

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
            content = [items_of(self.result[CONTENT]), division, *draws]
            shots, queries = (
                int(self.result.get(key_of_result(TARGET, f"{part}_images"), 0)) for part in ("train", "test")
            )
            name = self.choices.get("target", "target")
            over = self.result.get(TARGET_OVER, "repeats" if TARGET_CURVE in self.result else "test images")
            ways = len(self.result[TARGET_CLASSES])
            more = _repeats(self.config.get("target.repeats")) if over == "repeats" else ""
            asked = (name, None, ways, shots, queries, ACCURACY, True, over, repr(content), more)
            return Setting(*asked, items=kind(self.result))
        protocol, data = self.result[PROTOCOL], self.result[DATA]
        task = protocol.get(TEST, IMAGES)
        tested = [measure for measure in MEASURES if key_of_result(TEST, measure) in self.result]
        # A data set without classes is one of regression tasks.
        measure = tested[0] if tested else ACCURACY if "classes" in data else ERROR
        # Rotated classes and episodes within one group have the images' fingerprint, but are other episodes.
        content = [items_of(data), data.get("classes"), self._within_group]
        name = self.tested_on or self.choices.get("data", "data")
        return Setting(
            name,
            protocol["split"],
            as_count(task["ways"]),
            as_count(task["shots"]),
            as_count(task["queries"]),
            measure,
            bool(tested),
            "orders" if CONTINUAL in protocol else "episodes",
            repr(content),
            more_of_task(task),
            self.one_of_many,
            items_of_data(self.result),
        )

    @property
    def _within_group(self) -> bool:
        """Whether a setting has all ways of a test task drawn from one group."""
        own = (f"test.data.{self.tested_on}.", f"data.sets.{self.tested_on}.") if self.one_of_many else ()
        begins = next((each for each in own if any(key.startswith(each) for key in self.config)), "data.")
        return any(self.of_test(f"{begins}{name}") for name in WITHIN)

    @property
    def overlap(self) -> float:
        """How far the repeats of a target share their images, see `overlap_of`; 0 of any other test."""
        return overlap(self.result) if self.setting.over == "repeats" else 0.0

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
        if column == "recipe" and self.origin is not None:  # by which its weights were trained
            return self.origin.value(column)
        return self.choices[column] if column in self.choices else self.config.get(column)

    def scores(self) -> np.ndarray | None:
        """The score of every test episode after the last inner step, repeat or test image, `[n]`; None if the run left none."""
        over_images = self.tested == "target" and self.setting.over == "test images"
        name = "right" if over_images else "values"
        both = self.tested == TARGET and any(key_of_result(TEST, measure) in self.result for measure in MEASURES)
        of = TARGET if both else self.tested_on if self.one_of_many else ""
        try:
            stored = files.read_arrays(self.folder / contents.scores_file(of), files.MADE_AGAIN, [name])
            values: np.ndarray = stored[name] if over_images else stored[name][-1]
            return values if values.ndim == 1 else None
        except (UserError, IndexError):
            return None

    def task_picture(self) -> bytes | None:
        """The PNG of the first test task with what was predicted of it; None where the run has none, and where a target is tested."""
        if self.tested == TARGET:
            return None
        path = self.folder / contents.task_file(self.tested_on if self.one_of_many else "")
        try:
            found = path.read_bytes() if has_file(self.folder, path.name) else b""
        except OSError:
            return None
        return found if found.startswith(PNG) else None

    def curve(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The recorded steps and values of the first of `names` that `metrics.jsonl` has, both `[n]`, finite ones only."""
        points: dict[str, dict[int, float]] = {name: {} for name in names}
        for record in records(self.folder)[0]:
            for name in names:
                if isinstance(value := record.get(name), int | float) and np.isfinite(value):
                    points[name][record["step"]] = value
        found = next((points[name] for name in names if points[name]), {})
        return np.array(sorted(found)), np.array([found[step] for step in sorted(found)])


def has_file(folder: Path, name: str) -> bool:
    """Whether a folder has a file of that name; raises `OSError` where the folder may not be looked into."""
    try:
        return stat.S_ISREG((folder / name).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def records(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines of `metrics.jsonl` of a run, and what its curves lack, in words; empty where they are whole."""
    try:
        found, damaged = (
            files.read_json_lines(folder / contents.METRICS) if has_file(folder, contents.METRICS) else ([], 0)
        )
    except OSError as error:
        return [], f"cannot be read ({cause(error)}), so that the run has no curves"
    return found, f"{counted(damaged, 'damaged line')} left out of its curves" if damaged else ""


def cause(error: Exception) -> str:
    """What is wrong with a file, by the error that reading it led to."""
    return error.strerror or str(error) if isinstance(error, OSError) else first_line(error)


def words_of(result: dict[str, Any]) -> list[str]:
    """The overrides that a result stores; of one by version 0.1, which has only the command, the words of that."""
    if OVERRIDES in result:
        return [str(word) for word in result[OVERRIDES]]
    try:
        return shlex.split(result[COMMAND])
    except ValueError:  # an apostrophe
        return str(result[COMMAND]).split()
