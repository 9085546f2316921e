"""The images that a learner was trained on: what a meta-test on other classes must know of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metarun.data import shared
from metarun.data.shared import Classes, by_rank, shared_classes
from metarun.data.source import DataSource, Split
from metarun.data.table_source import TableSource
from metarun.errors import UserError

KEY = "seen"  # of what a checkpoint holds
Seen = Classes  # those whose images training has seen


def classes(data: DataSource, split: Split | None) -> Seen:
    """Notes what a training on images of `data` sees.

    Args:
        data: The data set; regression tasks have no classes.
        split: The split whose classes it sees; None for all classes.
    """
    found: Seen = {}
    for images in data.members.values():
        found = merged(found, shared.told(images, None if split is None else images.splits[split]))
    return found


def trained_on(seen: Mapping[str, Any], data: TableSource, numbers: Iterable[int]) -> set[int]:
    """Those of the classes with these numbers whose images were seen, or may have been where names alone can tell."""
    return set[int]().union(*shared_classes(seen, data, numbers))


def namesakes(seen: Mapping[str, Any], data: TableSource, numbers: Iterable[int]) -> list[str]:
    """The names of those of the classes with these numbers that are named as a class of other images that was seen.

    They may be the same classes, of images of another size, say. Names that mean nothing by themselves, as `0` does, count where both
    data sets have the same names of all classes.
    """
    numbers, own = set(shared.ranks(data, numbers)), shared.key(data)
    names = {str(data.table.names[number]) for number in numbers - trained_on(seen, data, numbers)}
    told = {
        noted[0]
        for other, known in seen.items()
        if other != own  # of which each class is known, also where two have one name
        for noted in by_rank(known).values()
        if noted and (shared.named_as(other, data) or shared.says_what_it_is(noted[0]))
    }
    return sorted(names & told)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> Seen:
    """Joins what was seen in both trainings."""
    found: Seen = {}
    for name in {**first, **second}:
        one, two = by_rank(first.get(name, {})), by_rank(second.get(name, {}))
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
        UserError: The learner was trained on images of test classes, or perhaps was, where names alone can tell.
    """
    for name, images in data.members.items():
        own = {*map(int, images.splits["train"]), *map(int, images.splits["val"])}
        by_images, by_names = (found - own for found in shared_classes(seen, images, images.splits["test"]))
        leaked = sorted(by_images or by_names)
        if leaked:
            of_them = (
                f"{len(leaked)} of the {len(images.splits['test'])} classes {f'of {name} ' if name else ''}that the meta-test is on "
                f"({named(images, leaked)})"
            )
            if by_images:
                raise UserError(
                    f"{origin}: was trained on images of {of_them}; meta-test weights that were trained on the training classes alone"
                )
            raise UserError(
                f"{origin}: was trained on classes with the names of {of_them}, in a data set that has all its class names; whether the "
                f"images are others cannot be told, since {why_by_names(seen, images)}; meta-test weights that were trained on the "
                "training classes alone"
            )


def why_by_names(seen: Mapping[str, Any], data: TableSource) -> str:
    """Why images cannot be compared with those that were seen, of a data set with the same names of classes."""
    forms = [other.split("/")[1] for other in seen if "/" in other and shared.named_as(other, data)]
    other = next((form for form in forms if form != data.form), None)
    return "they are not noted" if other is None else f"they were {other} and are {data.form} here"


def named(data: TableSource, numbers: Sequence[int], shown: int = 3) -> str:
    """The names of classes, the first few of them."""
    names = ", ".join(str(data.table.names[number]) for number in numbers[:shown])
    return names + (", ..." if len(numbers) > shown else "")
