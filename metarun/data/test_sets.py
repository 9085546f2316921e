"""Data sets that a network is tested on: brought to what it takes, with the classes that its training never saw."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from metarun.config import Node
from metarun.data.domains import built_images, built_table, read_as
from metarun.data.image_source import ImageSource
from metarun.data.shared import key, ranks, same_names, shared_classes, told
from metarun.data.source import DataSource, Split
from metarun.data.table_source import TableSource
from metarun.errors import UserError
from metarun.text import printable, shape_text

log = logging.getLogger("metarun")


def fit_to_network(nodes: Mapping[str, Node], source: DataSource, *, encoded: bool = False) -> dict[str, TableSource]:
    """Brings the data sets that a network is tested on to what it takes.

    A data set that can reads its files at the network's size; images of any other are resized bilinearly. Grey images are
    repeated as colours, and colours become their mean. Pixels are normalised by the training images of `source`, so that no
    test image has a part in it. Its classes are all classes; of a data set that is trained on they are the test classes of
    that training, and of one that shares classes with it, all but those that are trained or validated on. Images decide
    which classes are the same; names do where the images cannot be compared, which a line says.

    Args:
        nodes: The data sets.
        source: What is trained on.
        encoded: Whether an encoder stands between the items and the network, which takes items of any size.

    Raises:
        UserError: One is no set of images, or the network takes none.
    """
    trained = list(source.members.values())
    if not trained or (len(source.input_shape) != 3 and not encoded):
        kind = "vectors" if trained else "regression tasks"
        raise UserError(
            f"test.data: {', '.join(nodes)}: the network is trained on {kind}, and cannot be tested on images"
        )
    found: dict[str, TableSource] = {}
    for name, node in nodes.items():
        if encoded:
            built = built_table(node, name, "test.data")
        else:
            depth, height, width = source.input_shape
            images = built_images(node, name, height if height == width else None, depth, "test.data")
            built = images.fitted(source.input_shape, source.statistics_of(None))
        # An encoder takes images of any size, so that of any set the same images may have other pixels here.
        alike = [
            read_as(node, name, built, member, "test.data") if encoded or same_names(member, built) else built
            for member in trained
        ]
        found[name] = _divided(trained, built, alike, f"test.data: {printable(name)}")
    return found


def _divided(
    trained: Sequence[TableSource], built: TableSource, alike: Sequence[TableSource], where: str
) -> TableSource:
    """A data set with the classes for its test: of a set that is trained on those of its test, and else all that are new.

    Args:
        trained: What is trained on.
        built: The data set.
        alike: For each of `trained` the data set read as that one is, where it can be.
        where: What a line about it begins with.
    """
    apart, division = set[str](), None
    for member, images in zip(trained, alike, strict=True):
        if not same_names(member, built):
            continue
        by_images, by_names = shared_classes(told(member), images)
        if len(by_images | by_names) < len(ranks(built)):
            apart.add(key(member))
            continue
        if by_names:
            log.warning(
                "%s: is taken for a data set that is trained on: both have the same names of classes, and images that cannot be compared",
                where,
            )
        division = division or _division_of(member, built)
    found = built.divided(division or _division_by_images(trained, alike))
    found.told_apart |= apart
    return found


def _division_of(member: TableSource, built: TableSource) -> dict[Split, list[int]]:
    """The division of a set for another one of the same classes in any order: FC100 has CIFAR-FS's images."""
    own, place = ranks(member), {rank: number for number, rank in ranks(built).items()}
    return {split: [place[own[int(c)]] for c in numbers] for split, numbers in member.splits.items()}


def _division_by_images(trained: Sequence[TableSource], alike: Sequence[TableSource]) -> dict[Split, list[int]]:
    """The classes of a data set whose images are trained or validated on, and for the test all others.

    Args:
        trained: What is trained on.
        alike: For each of `trained` the data set read as that one is, where it can be.
    """
    splits: tuple[Split, ...] = ("train", "val")
    found: dict[Split, list[int]] = {}
    for split in splits:
        known = (
            shared_classes(told(member, member.splits[split]), images).by_images
            for member, images in zip(trained, alike, strict=True)
        )
        found[split] = sorted(set[int]().union(*known))
    rest = ranks(alike[0]).keys() - {number for numbers in found.values() for number in numbers}
    return {**found, "test": sorted(rest)}


def rule(items: TableSource, whole: bool, source: DataSource | None = None) -> dict[str, Any]:
    """Says what a test on a data set had of its classes and of its images, for `result.json`.

    Args:
        items: The data set.
        whole: Whether the network takes them as they are, without an encoder between.
        source: What is trained on.
    """
    count, every = len(items.splits["test"]), len(ranks(items))
    members = source.members.values() if source else ()
    if any(_names_by_split(member) == _names_by_split(items) for member in members):
        classes = f"its {count} test classes, since it is trained on too"
    elif count < every:
        classes = f"{count} of its {every} classes, since the images of the others are trained or validated on too"
    else:
        classes = f"all {count} classes"
    told = {
        "classes": classes + (", each also turned by 90, 180 and 270 degrees" if items.rotations else ""),
    }
    if whole and isinstance(items, ImageSource):
        own, shape = tuple(items.table.images.shape[1:]), items.input_shape
        told["images"] = shape_text(shape) if own == shape else f"{shape_text(own)} brought to {shape_text(shape)}"
    return told


def _names_by_split(data: TableSource) -> dict[Split, set[str]]:
    """The names of the classes of each split, which a set that is taken for one that is trained on has from that one."""
    return {split: {data.table.names[number] for number in numbers} for split, numbers in data.splits.items()}
