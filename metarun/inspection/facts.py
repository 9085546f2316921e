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
from metarun.data.folder import Folder, classes_of
from metarun.data.image_source import ImageSource
from metarun.data.label_files import may_be_image
from metarun.data.source import Split
from metarun.data.splits import SPLITS
from metarun.data.table_source import TableSource
from metarun.data.text import TextSource
from metarun.data.text_files import shortened
from metarun.errors import UserError
from metarun.files import typed_path
from metarun.inspection import duplicates
from metarun.inspection.image_files import has_image_suffix, survey
from metarun.text import printable

Progress = Callable[[str, int], Callable[[int], None]]  # of what is done, and how much there is (0: not known)
SHEET = 6  # classes of a split on the sheet of samples
SAMPLES = 6  # items of such a class
LISTED = 2000  # classes that are listed one by one


def inspect(name: str, node: Node, tasks: dict[Split, TaskShape], progress: Progress) -> dict[str, Any]:
    """Looks at a data set.

    Args:
        name: What it is called.
        node: Its settings.
        tasks: The tasks that are asked for, by split.
        progress: Makes a function that is told how far it is.

    Returns:
        JSON values, and under `source` the data set itself; what is wrong with it, if it cannot be used, under `problem`.
    """
    found: dict[str, Any] = {"name": name, "class": node.node._target_, "problem": ""}
    root = node.node.get("root")
    kind = _class_of(node.node._target_)
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
        if not isinstance(source, TableSource):
            raise UserError(f"{node.path}: are regression tasks, which hold no items to look at")
    except UserError as error:
        return {**found, "problem": str(error)}
    if bad and changes:
        found["note"] = f"bad files are left out below; a run refuses them unless {node.path}.skip_bad=true"
    found |= {
        "source": source,
        "fingerprint": source.describe()["fingerprint"],
        "input_shape": list(source.input_shape),
    }
    found |= counts(source, tasks)
    if isinstance(source, ImageSource):
        mean, deviation = source.measured(source.training_rows)
        found |= {"mean": mean.round(4).tolist(), "deviation": deviation.round(4).tolist()}
        found["duplicates"] = twins(source, progress(f"comparing the images of {name}", len(source.table.images)))
    if isinstance(source, TextSource):
        found["texts"] = texts(source)
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


def texts(source: TextSource) -> dict[str, Any]:
    """How long texts are, in words between blanks, how many were left out since they occur again, and a few of some classes."""
    told = source.describe()
    lengths = np.array([len(text.split()) for text in source.texts.texts])
    return {
        "median_words": float(np.median(lengths)),
        "most_words": int(lengths.max()),
        **{key: told.get(key, 0) for key in ("repeated", "repeated_in_a_later_split")},
        "samples": [
            {**row, "texts": [shortened(source.texts.texts[number]) for number in row["rows"]]} for row in sheet(source)
        ],
    }


def counts(source: TableSource, tasks: dict[Split, TaskShape]) -> dict[str, Any]:
    """Classes and items of each split, of each class, and the tasks that each split can serve."""
    sizes, names, turned = source.table.sizes, source.table.names, source.turns
    splits = {}
    for split in SPLITS:
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
    same = len({tuple(source.splits[split].tolist()) for split in SPLITS}) == 1
    listed = [
        {
            "name": printable(str(names[number])),
            "split": "all" if same else home.get(number, "none"),
            "items": int(sizes[number]),
        }
        for number in range(len(names))
    ]
    parts = source.table.metadata.get("parts")
    return {
        "splits": splits,
        "same_classes": same,
        "parts": {part: int(sum(numbers)) for part, numbers in parts.items()} if parts else None,
        "classes": listed[:LISTED],
        "classes_not_listed": max(0, len(listed) - LISTED),
    }


def fits(source: TableSource, split: Split, task: TaskShape) -> str:
    """Why a split cannot serve tasks, in the words of a run that is given them; empty where it can."""
    try:
        source.sampler(split, task, 0, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


def twins(source: ImageSource, progress: Callable[[int], None]) -> dict[str, Any]:
    """Images that are there twice."""
    table = source.table
    classes = np.searchsorted(table.offsets, np.arange(len(table.images)), side="right") - 1
    groups, what = _sides(source, classes)
    found = duplicates.find(table.read, groups, classes, progress)
    pairs = [
        {
            "rows": [a, b],
            "names": [printable(each) for each in source.identities(np.array([a, b]))],
            "sides": [_side(groups, row, what) for row in (a, b)],
            "exact": exact,
        }
        for a, b, exact in found.pairs
    ]
    numbers = {key: value for key, value in vars(found).items() if key != "pairs"}
    return {**numbers, "sides": what, "rule": duplicates.RULE, "pairs": pairs}


def _sides(source: ImageSource, classes: np.ndarray) -> tuple[np.ndarray, str]:
    """The split of each image, and whether that is of its class or the data set's own; -1 where nothing divides the images."""
    groups = np.full(len(classes), -1)
    distinct = not ({*source.splits["train"]} & {*source.splits["test"]})
    if distinct:
        for number, split in enumerate(SPLITS):
            groups[np.isin(classes, source.splits[split])] = number
        return groups, "splits of classes"
    parts = source.table.metadata.get("parts")
    if not parts:
        return groups, ""
    order = [
        number for c in range(len(source.table.names)) for number in np.repeat(range(3), [parts[s][c] for s in SPLITS])
    ]
    return np.array(order), "parts of images"


def _side(groups: np.ndarray, row: int, what: str) -> str:
    return SPLITS[groups[row]] if what and groups[row] >= 0 else ""


def sheet(source: TableSource) -> list[dict[str, Any]]:
    """Some items of some classes of each split: the rows of a sheet of samples, evenly spread, the same each time."""
    found = []
    offsets, seen = source.table.offsets, set[int]()
    for split in SPLITS:
        classes = [int(number) for number in source.splits[split] if int(number) not in seen]
        seen.update(classes)
        for number in _spread(classes, SHEET):
            rows = range(int(offsets[number]), int(offsets[number + 1]))
            found.append(
                {"split": split, "name": printable(str(source.table.names[number])), "rows": _spread(rows, SAMPLES)}
            )
    return found


def _spread(items: Sequence[int], count: int) -> list[int]:
    places = np.unique(np.linspace(0, max(len(items) - 1, 0), min(count, len(items))).round().astype(int))
    return [items[place] for place in places.tolist()]
