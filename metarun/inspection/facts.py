"""What is told of one data set: counts, sizes, pixel statistics, duplicates, and the tasks that fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class

from metarun.config import Node
from metarun.core import TaskShape
from metarun.data.file_names import may_be_image
from metarun.data.folder import Folder, classes_of
from metarun.data.image_source import ImageSource
from metarun.data.source import Split
from metarun.data.splits import SPLITS
from metarun.data.table_source import TableSource
from metarun.data.text import TextSource
from metarun.data.text_rows import shortened
from metarun.errors import UserError
from metarun.files import typed_path
from metarun.inspection import duplicates
from metarun.inspection.image_files import has_image_suffix, survey
from metarun.text import printable

Progress = Callable[[str, int], Callable[[int], None]]  # of what is done, and how much there is (0: not known)
SHEET = 6  # classes of a split on the sheet of samples
SAMPLES = 6  # items of such a class
# The ways in which images are divided for training and testing.
CLASSES, IMAGES = "splits of classes", "parts of images"


def inspect(
    name: str, node: Node, tasks: dict[Split, TaskShape], progress: Progress, *, as_target: bool = False
) -> dict[str, Any]:
    """Looks at a data set.

    Args:
        name: What it is called.
        node: Its settings.
        tasks: The tasks that are asked for, by split.
        progress: Makes a function that is told how far it is.
        as_target: Whether it is a target, which has all classes in each part and no splits of them.

    Returns:
        JSON values, and under `source` the data set itself; what is wrong with it, if it cannot be used, under `problem`.

    Raises:
        UserError: It draws tasks and has no items, which is nothing wrong with it.
    """
    found: dict[str, Any] = {"name": name, "class": node.node._target_, "problem": "", "as_target": as_target}
    root = node.node.get("root")
    kind = _class_of(node.node._target_)
    if kind is not object and not issubclass(kind, TableSource):
        raise UserError(
            f"{node.path}: {name} has regression tasks and no items that could be looked at; debug=fast without recipe=inspect tries it out"
        )
    if root and getattr(kind, "item", "") == "image" and typed_path(root).is_dir():
        # Of a folder the files of classes are read, whatever they are called; of other data sets nothing says which are.
        meant = may_be_image if issubclass(kind, Folder) else has_image_suffix
        told = progress(f"reading the files of {name}", 0)
        own = _files_of_classes(node) if issubclass(kind, Folder) else None
        found["files"] = survey(typed_path(root).absolute(), told, meant, own)
    bad = (found.get("files") or {}).get("unreadable_count", 0)
    changes = {"skip_bad": True} if bad and node.knows("skip_bad") else {}
    try:
        source = node.build(**changes)
    except UserError as error:
        return {**found, "problem": str(error)}
    if bad and changes:
        found["note"] = f"bad files are left out below; a run refuses them unless {node.path}.skip_bad=true"
    found |= {
        "source": source,
        "fingerprint": source.describe()["fingerprint"],
        "input_shape": list(source.input_shape),
    }
    found |= counts(source, tasks, as_target)
    if isinstance(source, ImageSource):
        # Of a target the training images are those of its training part, of all classes.
        rows = np.unique(source.labelled("train").rows) if as_target and found["parts"] else source.training_rows
        mean, deviation = source.measured(rows)
        found |= {"mean": mean.round(4).tolist(), "deviation": deviation.round(4).tolist()}
        found["duplicates"] = twins(
            source, progress(f"comparing the images of {name}", len(source.table.images)), as_target
        )
    if isinstance(source, TextSource):
        found["texts"] = texts(source, as_target)
    return found


def _files_of_classes(node: Node) -> list[Path] | None:
    """The files that a data set of class folders or tables reads; None where it cannot be told, of which `build` says why."""
    settings = ("root", "labels", "file_column", "label_column")
    with contextlib.suppress(UserError):
        return [
            path
            for entry in classes_of(*(node.node.get(name) for name in settings), tell=False)
            for path in entry.paths
        ]
    return None


def _class_of(target: str) -> type:
    """The class of a data set; `object` for one that cannot be imported, of which `build` says what is wrong."""
    with contextlib.suppress(Exception):
        return get_class(target)
    return object


def texts(source: TextSource, as_target: bool) -> dict[str, Any]:
    """How long texts are, in words between blanks, how many were left out since they occur again, and a few of some classes."""
    told = source.describe()
    lengths = np.array([len(text.split()) for text in source.texts.texts])
    return {
        "median_words": float(np.median(lengths)),
        "most_words": int(lengths.max()),
        **{key: told.get(key, 0) for key in ("repeated", "repeated_in_a_later_split")},
        "samples": [
            {**row, "texts": [shortened(source.texts.texts[number]) for number in row["rows"]]}
            for row in sheet(source, as_target)
        ],
    }


def counts(source: TableSource, tasks: dict[Split, TaskShape], as_target: bool) -> dict[str, Any]:
    """Classes and items of each split, of each class, and the tasks that each split can serve.

    Args:
        source: The data set.
        tasks: The tasks that are asked for, by split.
        as_target: Whether it is a target: then there are no splits of classes to tell of.
    """
    sizes, names, turned = source.table.sizes, source.table.names, source.turns
    splits = {}
    for split in () if as_target else SPLITS:
        classes = source.splits[split]
        own = sizes[classes] if len(classes) else np.zeros(1, np.int64)
        groups = np.array(source.table.groups)[classes]
        together = np.unique(groups, return_counts=True)[1].max(initial=0) if source.within_group else len(classes)
        told: dict[str, Any] = {
            "classes": len(classes) * turned,
            "items": int(own.sum()),
            "smallest": int(own.min()),
            "median": float(np.median(own)),
            "largest": int(own.max()),
            "largest_ways": int(together) * turned,
            "largest_shots_and_queries": int(own.min()),
        }
        told["asked"] = fits(source, split, tasks[split]) if split in tasks else None
        splits[split] = told
    home = {int(number): split for split in SPLITS for number in source.splits[split]}
    same = as_target or len({tuple(source.splits[split].tolist()) for split in SPLITS}) == 1
    listed = [
        {
            "name": printable(str(names[number])),
            "split": "all" if same else home.get(number, "none"),
            "items": int(sizes[number]),
        }
        for number in range(len(names))
    ]
    parts = source.table.metadata.get("parts")
    every = [sizes[number] for number in _known(source)]
    told = {"classes": len(every), "items": sum(every), "smallest": min(every), "largest": max(every)}
    return {
        "splits": splits,
        "sizes": {name: int(number) for name, number in told.items()},
        "same_classes": same,
        "parts": {part: int(sum(numbers)) for part, numbers in parts.items()} if parts else None,
        "classes": listed,
    }


def fits(source: TableSource, split: Split, task: TaskShape) -> str:
    """Why a split cannot serve tasks, in the words of a run that is given them; empty where it can."""
    try:
        source.sampler(split, task, 0, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


def twins(source: ImageSource, progress: Callable[[int], None], as_target: bool) -> dict[str, Any]:
    """Images that are there twice."""
    table = source.table
    classes = np.searchsorted(table.offsets, np.arange(len(table.images)), side="right") - 1
    sides = _sides(source, classes, as_target)
    found = duplicates.find(table.read, sides, classes, progress)
    pairs = [
        {
            "rows": [a, b],
            "names": [printable(each) for each in source.identities(np.array([a, b]))],
            "sides": [_side(sides, row) for row in (a, b)],
            "exact": exact,
        }
        for a, b, exact in found.pairs
    ]
    numbers = {key: value for key, value in vars(found).items() if key != "pairs"}
    return {**numbers, "sides": list(sides), "rule": duplicates.RULE, "pairs": pairs}


def _sides(source: ImageSource, classes: np.ndarray, as_target: bool) -> dict[str, np.ndarray]:
    """In which ways the images are divided for training and testing, and the side of each image, -1 on none: see `duplicates.find`.

    Of a source the classes are; its own parts of images divide every data set that has some, and a target by nothing else.
    """
    found: dict[str, np.ndarray] = {}
    if not as_target and not source.undivided:
        found[CLASSES] = np.full(len(classes), -1)
        for number, split in enumerate(SPLITS):
            found[CLASSES][np.isin(classes, source.splits[split])] = number
    if parts := source.table.metadata.get("parts"):
        each = (np.repeat(range(3), [parts[split][c] for split in SPLITS]) for c in range(len(source.table.names)))
        found[IMAGES] = np.concatenate(list(each))
    return found


def _side(sides: dict[str, np.ndarray], row: int) -> str:
    """On which side an image is, in words; where it is divided in several ways, of what."""
    told = {way: SPLITS[side[row]] for way, side in sides.items() if side[row] >= 0}
    return ", ".join(split if len(sides) == 1 else f"{split} {way.rpartition(' ')[2]}" for way, split in told.items())


def sheet(source: TableSource, as_target: bool) -> list[dict[str, Any]]:
    """Some items of some classes of each split: the rows of a sheet of samples, evenly spread, the same each time."""
    found = []
    offsets, seen = source.table.offsets, set[int]()
    for split, numbers in {"all": _known(source)}.items() if as_target else source.splits.items():
        classes = [int(number) for number in numbers if int(number) not in seen]
        seen.update(classes)
        for number in _spread(classes, SHEET):
            rows = range(int(offsets[number]), int(offsets[number + 1]))
            found.append(
                {"split": split, "name": printable(str(source.table.names[number])), "rows": _spread(rows, SAMPLES)}
            )
    return found


def _known(source: TableSource) -> list[int]:
    """The numbers of the classes, without that of items of none."""
    return [number for number in range(len(source.table.names)) if number not in source.unknown.values()]


def _spread(items: Sequence[int], count: int) -> list[int]:
    places = np.unique(np.linspace(0, max(len(items) - 1, 0), min(count, len(items))).round().astype(int))
    return [items[place] for place in places.tolist()]
