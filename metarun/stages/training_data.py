"""What a training stage trains on and is validated on, and what a test shares with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from metarun.config import Noise
from metarun.core import TaskShape
from metarun.data.image_batches import Labelled, batches
from metarun.data.noise import with_noise
from metarun.data.shared import key, shared_classes
from metarun.data.source import DataSource, Split
from metarun.data.table_source import TableSource
from metarun.encoders.encoded import encoded_members
from metarun.engine.learner import Sampler, Trainable
from metarun.errors import UserError
from metarun.runs import seen
from metarun.runs.run import Run
from metarun.stages.compatibility import check_train_task
from metarun.text import counted

log = logging.getLogger("metarun")


def trained_on(run: Run, tested: Labelled, reads_source: bool = False) -> tuple[int, int]:
    """Counts the target's images `tested` that the source's training has among its own, and those that it may have besides.

    Where both are one data set these are known by their rows, and else, of classes that are the same, by the images themselves. Where
    these cannot be compared, being of another size, all classes of the same names with as many images may be the same.

    Args:
        run: The run.
        tested: Images of its target.
        reads_source: Whether the way with the target trains on the source's images as well, beside the stages so far.
    """
    target = run.target.source.underlying if run.target else None
    if not isinstance(target, TableSource):
        return 0, 0
    asked = {*tested.rows.tolist()}
    found, perhaps = set[int](), set[int]()
    for own, rows in _training_parts(run, reads_source):
        known = _those_of(target, asked, own, rows)
        found |= known
        if not known and own.form != target.form and _same_classes(own, target):
            perhaps |= asked & rows
    return len(found), len(perhaps - found)


def _same_classes(one: TableSource, two: TableSource) -> bool:
    """Whether two data sets have the same names of classes in the same order, and as many items of each."""
    return list(one.table.names) == list(two.table.names) and np.array_equal(one.table.offsets, two.table.offsets)


def _training_parts(run: Run, reads_source: bool) -> Iterator[tuple[TableSource, set[int]]]:
    """The source's data sets, each with the rows that are trained on, see `trained_on`."""
    for member in run.data.members.values():
        items, rows = member.underlying, set[int]()
        if reads_source:  # `SourceImages`
            rows |= {*training_images(items, "images", None).rows.tolist()}
        for learner in run.trained:
            on_images = learner.task is None and learner.settings.validate_on == "images"
            split = run.training_split if on_images else "train"
            rows |= {*training_images(items, "images" if on_images else "episodes", split).rows.tolist()}
        if isinstance(items, TableSource):
            yield items, rows


def _those_of(target: TableSource, asked: set[int], own: TableSource, rows: set[int]) -> set[int]:
    """The rows of the target, of those that are `asked` for, that are among the `rows` of a data set: the same one, or another."""
    return asked & (rows if key(own) == key(target) else _rows_of(target, asked, own, rows))


def _rows_of(target: TableSource, asked: set[int], own: TableSource, rows: set[int]) -> set[int]:
    """The rows of the target, of those that are `asked` for, whose items are those of the `rows` of another data set."""
    if own.form != target.form:
        return set()
    tested = {row: target.digest_of(row) for row in asked}
    every = set(tested.values()).union(*(target.known_digests(number) for number in range(len(target.table.names))))
    every.discard(None)  # a blank image, which may be anything's
    known = set[str | None]()
    for number, name in enumerate(own.table.names):
        # Of a class that shares none of some of its items all are compared where the other has its name.
        if name in target.table.names or not every.isdisjoint(own.digests(number)):
            known |= {own.digest_of(row) for row in range(*own.table.offsets[number : number + 2]) if row in rows}
    known.discard(None)
    return {row for row, digest in tested.items() if digest in known}


def warn_trained_on(run: Run, tested: Labelled, reads_source: bool = False) -> dict[str, int]:
    """Warns of such images; the fact for the protocol, empty where there are none. The arguments are those of `trained_on`."""
    count, perhaps = trained_on(run, tested, reads_source)
    told: dict[str, int] = {}
    if count:
        log.warning(
            "target: the training on the source's %ss sees %d of its test %ss, so that the accuracy says nothing of %ss not seen before",
            tested.item, count, tested.item, tested.item,
        )  # fmt: skip
        told["test_images_trained_on"] = count
    if perhaps:
        log.warning(
            "target: the training on the source's images may see %d of its test images: both have the same names of classes and as many "
            "images of each, which cannot be compared at different sizes", perhaps,
        )  # fmt: skip
        told["test_images_perhaps_trained_on"] = perhaps
    return told


def warn_brought(run: Run) -> dict[str, int]:
    """Warns where the learner begins with weights that were trained on images of the target's classes; the fact for the protocol."""
    assert run.target is not None
    members = list(run.target.source.members.values())
    every = sum(len(images.table.names) for images in members)
    told: dict[str, int] = {}
    for name, fact, how in (
        ("by_images", "target_classes_trained_on", "images of %d of its %d classes"),
        (
            "by_names",
            "target_classes_named_as_trained_on",
            "classes with the names of %d of its %d, whose images cannot be compared with its own",
        ),
    ):
        found = {
            one.where: sum(len(getattr(shared_classes(one.seen, images), name)) for images in members)
            for one in run.learner.origins
        }
        if count := max(found.values(), default=0):
            log.warning(
                f"target: %s brings weights that were trained on {how}, test images perhaps among them, so that the accuracy may say "
                "nothing of images not seen before",
                max(found, key=lambda where: found[where]),
                count,
                every,
            )
            told[fact] = count
    return told


def refuse_target_labels(run: Run) -> None:
    """Checks that no training before a stage that learns labelled subsets of the target reads the target's labels.

    Such a training reads those of all its training images: more than a subset, and where the target is divided anew in each
    repeat those of test images too.

    Raises:
        UserError: One does.
    """
    for learner in run.trained:
        if learner.algorithm.uses_target == "labels":
            raise UserError(
                f"{learner.built_from}: {type(learner.algorithm).__name__} trains on the labels of all of the target's training images, "
                "so that what this recipe tells of labelled subsets would not hold; use recipe=domain_adaptation, or a method without "
                f"the target's labels ({learner.built_from}=baseline, say)"
            )


def _fitted_to(run: Run, asked: set[int]) -> set[int]:
    """The rows of the target, of those that are `asked` for, that an encoder was fitted to, as training items of the source."""
    target = run.target.source.underlying if run.target else None
    found = set[int]()
    for own in encoded_members(run.data).values():
        if own.encoder.fitted and isinstance(target, TableSource):
            found |= _those_of(target, asked, own, {*own.training_rows.tolist()})
    return found


def warn_seen_unlabelled(run: Run, tested: Labelled) -> dict[str, int]:
    """Warns where a training sees some of the target's images `tested` without their labels; the fact for the protocol."""
    assert run.target is not None
    asked, items = {*tested.rows.tolist()}, run.target.kind
    if any(learner.algorithm.uses_target == "images" for learner in run.trained):
        who, count = "training", len({*run.target.train.rows.tolist()} & asked)
    else:
        who, count = "encoder, which is fitted to the source,", len(_fitted_to(run, asked))
    if not count:
        return {}
    log.warning(
        "target: the %s sees %d of its %s without their labels, later test %s among them, so that the test is transductive",
        who, count, items, items,
    )  # fmt: skip
    return {"test_images_seen_unlabelled": count}


def warn_namesakes(run: Run, data: DataSource, name: str = "") -> dict[str, Any]:
    """Warns of test classes that have the names of others that the learner was trained on.

    Args:
        run: The run.
        data: What it is tested on.
        name: The data set's name; empty for the only one.

    Returns:
        How many they are, and their names; empty where there are none.
    """
    found: set[str] = set()
    for images in data.members.values():
        both = {*map(int, images.splits["train"])} | {*map(int, images.splits["val"])}
        found |= {*seen.namesakes(run.learner.seen, images, {*map(int, images.splits["test"])} - both)}
    if not found:
        return {}
    names = sorted(found)
    log.warning(
        "%s%s named as classes of another data set that was trained on (%s); if they are the same, they are not new to the method",
        f"{name}: " if name else "",
        counted(len(names), "test class is", "test classes are"),
        ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
    )
    return {"named_as_trained_on": {"count": len(names), "names": names}}


def image_batches(run: Run, learner: Trainable, split: Split | None) -> Sampler:
    """Samples shuffled batches of labelled images: of the source, and of the target where the method trains on it too.

    Args:
        run: The run.
        learner: What is trained on them.
        split: The split of whose classes they are; None for all classes.

    Raises:
        UserError: The method needs a target and there is none, or the target's images are of the source's test classes.
    """
    algorithm, target = learner.algorithm, run.target
    reads = algorithm.uses_target != "no"
    if reads and target is None:
        raise UserError(
            f"{learner.built_from}: {type(algorithm).__name__} trains on a target's {algorithm.uses_target} too; "
            "use recipe=domain_adaptation target=digits, say"
        )
    images = training_images(run.data, learner.settings.validate_on, split).with_views()
    second = target.train if reads and target else None
    if reads and target:
        learner.seen = seen.merged(learner.seen, seen.classes(target.source, None))
    labels = algorithm.uses_target == "labels"
    return batches(images, run.config.seed, learner.hardware.device, second, target_labels=labels)


def held_out_images(run: Run, learner: Trainable) -> Labelled | None:
    """Selects the images that a method on batches is validated on: held out of the classes that it trains on.

    Args:
        run: The run.
        learner: What is validated.

    Returns:
        The images, the target's only where the method trains on their labels; None where episodes of the validation classes
        are to be used.

    Raises:
        UserError: The classes have too few images to hold any out.
    """
    if learner.settings.validate_on != "images":
        return None
    of_target = learner.algorithm.uses_target == "labels" and run.target
    if of_target and run.target:
        images = run.target.validation
    else:
        known = training_images(run.data, "images", run.training_split)
        images = replace(run.data.labelled("val", run.training_split), reference=known.reference)
    if not len(images):
        raise UserError(
            f"{learner.key}.validate_on=images: the classes have too few images to hold any out for validation; use "
            f"{learner.key}.validate_on=episodes"
        )
    return images


def training_episodes(run: Run, learner: Trainable) -> Sampler:
    """Samples episodes of the training classes, with the noise that the training's settings ask for."""
    assert learner.task is not None
    check_train_task(learner, learner.task, run.test_task)
    noise = learner.settings.noise

    def sampler(task: TaskShape) -> Sampler:
        return run.episodes("train", task, learner.hardware.device)

    if not noise.tasks:
        if noise.labels != Noise.labels:
            place = f"{learner.key}.noise"
            log.warning(
                "%s.labels=%g: no training task has wrong labels, for %s.tasks is 0", place, noise.labels, place
            )
        return sampler(learner.task)
    return with_noise(sampler, learner.task, run.config.seed, noise.tasks, noise.labels)


def sequence_images(data: DataSource, task: TaskShape) -> Labelled:
    """Selects what a method on sequences trains on: all images of the training classes that have `task.min_items` of them.

    Raises:
        UserError: No class has so many.
    """
    found = data.labelled(None, "train")
    kept = found.of_at_least(task.min_items)
    if not len(kept):
        classes = counted(len(found.names), "training class", "training classes")
        raise UserError(f"task.min_items={task.min_items}: leaves 0 of the {classes}; lower it")
    return kept


def training_images(data: DataSource, validate_on: str, split: Split | None) -> Labelled:
    """Selects what a method on batches trains on.

    Args:
        data: The source.
        validate_on: `episodes` of the validation classes: then these are all images of the training classes. `images`: then
            a part of each class is held out, and these are the others.
        split: With `images`, the split of whose classes they are; None for all classes.
    """
    if validate_on != "images":
        return data.labelled(None, "train")
    images = data.labelled("train", split)
    # Pixels of all classes are normalised by these images, as those of a target are; of the training classes as in episodes.
    return images if split is not None else images.normalized_by(images)
