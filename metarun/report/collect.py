"""The runs below a folder: those that can be used, and a line for each that cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from metarun import files
from metarun.config import flat
from metarun.config.overrides import key_of
from metarun.config.yaml_files import LOADER, has_alias
from metarun.errors import lacks
from metarun.renamed import current_choices
from metarun.report.finished import IMAGES, FinishedRun, cause, has_file, items_of, records, words_of
from metarun.report.grouping import Group, crossed, grouped, recipes, swept, unsaid_differences
from metarun.runs import contents
from metarun.runs.result import (
    CHECKPOINT_DATA,
    CHOICES,
    COMMAND,
    CONTENT,
    DATA,
    MEASURES,
    PROTOCOL,
    SCORE,
    SETS,
    TARGET_ACCURACY,
    TEST,
    TRAIN_SECONDS,
    TRAIN_STEPS,
    half_of,
    of_one,
    restored,
)
from metarun.runs.result import key as key_of_result
from metarun.text import all_printable

# What values of other types, or beyond those that can be computed with, lead to.
MALFORMED = (TypeError, KeyError, ValueError, AttributeError, IndexError, ArithmeticError)


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
    collection.columns += recipes(runs, collection.columns)
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


def has_result(folder: Path) -> bool:
    """Whether the run in `folder` is finished; raises `Unreadable` where that cannot be told."""
    try:
        if has_file(folder, contents.RESULT):
            return True
        os.scandir(folder).close()  # one that may not be looked into is no unfinished run
        return False
    except OSError as error:
        raise Unreadable(folder, cause(error)) from error


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
        if has_alias(text):
            raise ValueError("it has an alias (*), which no run stores")
        config = all_printable(flat(yaml.load(text, LOADER)))
        if not config.keys() - {""}:
            raise ValueError("it holds no keys")
        if not text.endswith("\n"):  # it was written whole, and so ended its last line
            raise ValueError("it was cut off")
        if used:
            raise NothingTested(folder, "it tested nothing")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
        found = files.damage(path) if isinstance(error, ValueError | yaml.YAMLError) and path.is_file() else ""
        raise Unreadable(path, found if "zero" in found or "empty" in found else cause(error)) from error
    try:
        stored = current_choices(result.get(CHOICES, {}))
        chosen = {group: choice for group, choice in stored.items() if choice is not None}
        choices = {**_classes(config), **chosen}
        typed = overridden(words_of(result), config, choices)
        run = FinishedRun(folder, result, config, choices, frozenset(typed), (folder / contents.RESULT).stat().st_mtime)
        # The choices of the command line of a test are not what the weights were trained with.
        return _trained_with(run) if config.get("checkpoint") else run
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise Unreadable(folder / contents.RESULT, cause(error)) from error


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
    return items_of(before) if before and items_of(before) != items_of(result.get(DATA, before)) else ""


def _classes(config: dict[str, Any]) -> dict[str, str]:
    """The class of each group that has one: its name where the choice is not known."""
    targets = {key.removesuffix("._target_"): str(value) for key, value in config.items() if key.endswith("._target_")}
    return {group: target.rpartition(".")[2] for group, target in targets.items()}
