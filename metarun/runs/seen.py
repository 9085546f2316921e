"""The images that a learner was trained on: what a meta-test on other classes must know of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metarun import files
from metarun.data.shared import ClassIndex, says_what_it_is
from metarun.data.source import DataSource, Split
from metarun.data.table_source import TableSource
from metarun.errors import UserError

KEY = "seen"  # of what a checkpoint holds
# For each data set, by `key`, the classes whose images training has seen: of each, by its rank, its name and the digests of some
# items. Checkpoints of older versions have a list of the ranks alone.
Seen = dict[str, dict[int, list[str]]]


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
        every = range(len(images.table.names)) if split is None else images.splits[split]
        told = {
            rank: [str(images.table.names[number]), *images.digests(number)]
            for number, rank in _ranks(images, every).items()
        }
        found = merged(found, {key(images): told})
    return found


def _told(known: Any) -> dict[int, list[str]]:
    """The classes of one data set, of which an older checkpoint tells the ranks alone."""
    return dict(known) if isinstance(known, Mapping) else {rank: [] for rank in known}


def _of_others(seen: Mapping[str, Any], data: TableSource) -> list[list[str]]:
    """What is told of the classes of other data sets, each its name and the digests of some items."""
    own = key(data)
    return [told for name, known in seen.items() if name != own for told in _told(known).values() if told]


def trained_on(seen: Mapping[str, Any], data: TableSource, numbers: Iterable[int]) -> set[int]:
    """Those of the classes with these numbers whose images were seen: in this data set, or in another that shares them."""
    known, ranks = _told(seen.get(key(data), {})), _ranks(data, numbers)
    found = {number for number, rank in ranks.items() if rank in known}
    if others := _of_others(seen, data):
        index = ClassIndex((0, name, digests) for name, *digests in others)
        found |= {
            number
            for number in ranks.keys() - found
            if index.find(data.table.names[number], data.digests(number)) is not None
        }
    return found


def namesakes(seen: Mapping[str, Any], data: TableSource, numbers: Iterable[int]) -> list[str]:
    """The names of those of the classes with these numbers that are named as a class of another data set that was seen.

    They may be the same classes, of images of another size, say. Names that mean nothing by themselves, as `0` does, do not count.
    """
    names = {str(data.table.names[number]) for number in _ranks(data, numbers)}
    return sorted(names & {told[0] for told in _of_others(seen, data) if says_what_it_is(told[0])})


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> Seen:
    """What was seen in both trainings together."""
    found: Seen = {}
    for name in {**first, **second}:
        one, two = _told(first.get(name, {})), _told(second.get(name, {}))
        found[name] = {rank: two.get(rank) or one.get(rank, []) for rank in sorted({*one, *two})}
    return found


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
