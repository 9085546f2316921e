"""The images that a learner was trained on: what a meta-test on other classes must know of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metarun import files
from metarun.data.source import DataSource, Split
from metarun.data.table_source import TableSource
from metarun.errors import UserError

KEY = "seen"  # of what a checkpoint holds
Seen = dict[str, list[int]]  # for each data set, by `key`, the classes whose images training has seen


def key(data: TableSource) -> str:
    """A digest of the names of all classes: the same for a data set at another size, with another split or in another order."""
    return files.digest(_names(data))


def _names(data: TableSource) -> list[str]:
    """The names of all classes, in the order of the alphabet: CIFAR-FS and FC100 have the same ones, each in its own order."""
    return sorted(name for number, name in enumerate(data.table.names) if number not in data.unknown.values())


def _ranks(data: TableSource, numbers: Iterable[int]) -> dict[int, int]:
    """The place of each of these classes among `_names`, by its number; a class of unknown items has none."""
    place = {name: rank for rank, name in enumerate(_names(data))}
    return {int(number): place[data.table.names[number]] for number in numbers if data.table.names[number] in place}


def classes(data: DataSource, split: Split | None) -> Seen:
    """What a training on images of `data` sees.

    Args:
        data: The data set; regression tasks have no classes.
        split: The split whose classes it sees; None for all classes.
    """
    found: Seen = {}
    for images in data.members.values():
        every = range(len(images.table.names))
        found = merged(
            found, {key(images): sorted(_ranks(images, every if split is None else images.splits[split]).values())}
        )
    return found


def trained_on(seen: Mapping[str, Any], data: TableSource, numbers: Iterable[int]) -> set[int]:
    """Those of the classes with these numbers whose images were seen."""
    known = set(seen.get(key(data), []))
    return {number for number, rank in _ranks(data, numbers).items() if rank in known}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> Seen:
    """What was seen in both trainings together."""
    return {name: sorted({*first.get(name, []), *second.get(name, [])}) for name in {**first, **second}}


def refuse_test_classes(seen: Mapping[str, Any], data: DataSource, origin: str) -> None:
    """Checks that a learner has seen no image of a class that it is tested on.

    A data set with too few classes to divide has the same ones for training and testing, which the run says elsewhere.

    Args:
        seen: What the learner was trained on.
        data: What it is tested on.
        origin: Where the learner comes from, for the message.

    Raises:
        UserError: The learner was trained on images of test classes.
    """
    for name, images in data.members.items():
        own = {*map(int, images.splits["train"]), *map(int, images.splits["val"])}
        leaked = trained_on(seen, images, images.splits["test"]) - own
        if leaked:
            raise UserError(
                f"{origin}: was trained on images of {len(leaked)} of the {len(images.splits['test'])} classes "
                f"{f'of {name} ' if name else ''}that the meta-test is on ({named(images, sorted(leaked))}); meta-test weights that "
                "were trained on the training classes alone"
            )


def named(data: TableSource, numbers: Sequence[int], shown: int = 3) -> str:
    """The names of classes, the first few of them."""
    names = ", ".join(str(data.table.names[number]) for number in numbers[:shown])
    return names + (", ..." if len(numbers) > shown else "")
