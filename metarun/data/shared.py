"""Classes of one data set that another has too: their images decide, and names where no images can be compared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from metarun import files
from metarun.data.table_source import TableSource

GENERIC = {"category", "char", "character", "class", "cluster", "group", "label", "letter", "set", "type"}
# For each data set, by `key`, some of its classes: of each, by its rank among the names, its name and the digests of some items.
# Checkpoints of older versions have a list of the ranks alone, or keys that say nothing of the images.
Classes = dict[str, dict[int, list[str]]]


class ClassIndex:
    """Classes, to be known again by some of their items among all items of another class, in any order and with others.

    One shared item and the same name make two classes the same, and so do two shared items under any name: one may be a placeholder, or
    a copy that was put in a wrong class. A class of which one item is noted is another one of this item alone.

    Args:
        classes: Of each class its name and the digests of some items, see `TableSource.digests`.
    """

    def __init__(self, classes: Iterable[tuple[str, Sequence[str]]]) -> None:
        self._names: list[str] = []
        self._alone: set[str] = set()
        self._homes: dict[str, list[int]] = {}
        for place, (name, digests) in enumerate(classes):
            self._names.append(name)
            self._alone |= {*digests} if len({*digests}) == 1 else set()
            for digest in {*digests}:
                self._homes.setdefault(digest, []).append(place)

    def has(self, name: str, digests: frozenset[str]) -> bool:
        """Whether a class is one of these.

        Args:
            name: Its name.
            digests: Those of all its items.
        """
        shared = Counter(place for digest in digests for place in self._homes.get(digest, ()))
        if any(count > 1 or self._names[place] == name for place, count in shared.items()):
            return True
        return len(digests) == 1 and not digests.isdisjoint(self._alone)


class Shared(NamedTuple):
    """The numbers of the classes of a data set that are among those of others.

    Attributes:
        by_images: Those that have the same items.
        by_names: Those of which that is not known: a data set with the same names of all classes has them, and no items of theirs can
            be compared, since they have another form or are not noted.
    """

    by_images: set[int]
    by_names: set[int]


def key(data: TableSource) -> str:
    """Computes what a data set is known by: a digest of the names of its classes, the form of its items, and a digest of these.

    The first is the same for a data set at another size, with another split or in another order.
    """
    return f"{_digest_of_names(data)}/{data.form}/{data.table.fingerprint[:16]}"


def same_names(one: TableSource, two: TableSource) -> bool:
    """Whether two data sets have the same names of classes, in any order: CIFAR-FS and FC100 have, as two sets of digits have."""
    return _names(one) == _names(two)


def _ordered(data: TableSource) -> list[int]:
    """The numbers of all classes in the order of their names; a library may number the classes of each split from 0 and name none."""
    every = (number for number in range(len(data.table.names)) if number not in data.unknown.values())
    return sorted(every, key=lambda number: (data.table.names[number], number))


def _names(data: TableSource) -> list[str]:
    """The names of all classes, in the order of the alphabet: CIFAR-FS and FC100 have the same ones, each in its own order."""
    return [data.table.names[number] for number in _ordered(data)]


def _digest_of_names(data: TableSource) -> str:
    return files.digest(_names(data))


def ranks(data: TableSource, numbers: Iterable[int] | None = None) -> dict[int, int]:
    """The place of classes among the sorted names, by their numbers; a class of unknown items has none.

    Args:
        data: The data set.
        numbers: Those of the classes; None for all.
    """
    place = {number: rank for rank, number in enumerate(_ordered(data))}
    every = range(len(data.table.names))
    return {int(number): place[number] for number in (every if numbers is None else numbers) if number in place}


def told(data: TableSource, numbers: Iterable[int] | None = None) -> Classes:
    """Writes down by what `shared_classes` knows classes again.

    Args:
        data: The data set.
        numbers: Those of the classes; None for all.
    """
    found = ranks(data, numbers)
    return {key(data): {rank: [str(data.table.names[number]), *data.digests(number)] for number, rank in found.items()}}


def by_rank(known: Any) -> dict[int, list[str]]:
    """What `told` noted of the classes of one data set, of which an older checkpoint has the ranks alone."""
    return dict(known) if isinstance(known, Mapping) else {rank: [] for rank in known}


def shared_classes(known: Mapping[str, Any], data: TableSource, numbers: Iterable[int] | None = None) -> Shared:
    """Finds the classes of a data set that are among the noted ones of this or of other data sets.

    A class is known again by the noted items, see `ClassIndex`, which are looked for among all of its items: another division into
    parts, and some items more or less, change which ones it begins and ends with. Of a very large table only some are looked at.

    Args:
        known: What `told` noted.
        data: The data set.
        numbers: Those of the classes that are asked for; None for all.
    """
    asked, names, own = ranks(data, numbers), data.table.names, key(data)
    forms = {other: other.split("/")[1:2] for other in known}
    others = [classes for other, classes in known.items() if other != own and forms[other] in ([], [data.form])]
    noted = [told for classes in others for told in by_rank(classes).values() if told]
    index = ClassIndex((name, digests) for name, *digests in noted)
    by_images = {number for number in asked if noted and index.has(names[number], data.known_digests(number))}
    by_names = set[int]()
    for other, classes in known.items():
        if not named_as(other, data):
            continue
        form, noted_of = forms[other], by_rank(classes)
        for number, rank in asked.items():
            if number in by_images or rank not in noted_of:
                continue
            digests = noted_of[rank][1:]
            if other == own or (form in ([], [data.form]) and not data.every_digest(number).isdisjoint(digests)):
                by_images.add(number)
            elif other not in data.told_apart and (form != [data.form] or not digests or not data.digests(number)):
                by_names.add(number)
    return Shared(by_images, by_names - by_images)


def named_as(other: str, data: TableSource) -> bool:
    """Whether the data set that a `key` stands for has the same names of all classes as another one."""
    return other.partition("/")[0] == _digest_of_names(data)


def says_what_it_is(name: str) -> bool:
    """Whether the name of a class means the same in any data set, as `n01532829` and `robin` do, and `0`, `a` or `class_3` do not."""
    words = re.findall(r"[^\W\d_]{3,}", name)
    return any(word.lower() not in GENERIC for word in words) or bool(re.search(r"[^\W\d_]\d{6}", name))
