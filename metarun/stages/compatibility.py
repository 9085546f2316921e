"""Whether a method, its tasks and the processes go together."""

from __future__ import annotations

import copy
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metarun.core import Algorithm, Batch, Episodes, TaskShape, count_text, largest, least
from metarun.engine.distributed import World
from metarun.engine.learner import Trainable
from metarun.errors import UserError
from metarun.ops import batch_norm, draws
from metarun.ops.draws import drawing


def check_training(algorithm: Algorithm, settings: Any, world: World, train: str, wrapper: str | None) -> None:
    """Checks that the method can be trained on what it is to be trained on, by so many processes.

    A training without a step is shared by none, so that their number does not matter to it.

    Args:
        algorithm: The method.
        settings: Its training's settings.
        world: The processes.
        train: The key of these settings, for the message of an error.
        wrapper: The key of what goes around the method; None for nothing.

    Raises:
        UserError: It cannot.
    """
    name = type(algorithm).__name__
    check_shares(settings, world, train)
    shared = world.size > 1 and settings.steps > 0
    if settings.validate_on == "images" and not algorithm.has_classes:
        raise UserError(f"{train}.validate_on=images: {without_classes(algorithm)}; use {train}.validate_on=episodes")
    if algorithm.trains_on == "episodes":
        return
    what = "batches" if algorithm.trains_on == "batches" else "sequences"
    for key in filter(None, (wrapper, f"{train}.noise.tasks" if settings.noise.tasks else None)):
        raise UserError(
            f"{key}: is of training tasks, but {name} trains on {what} of images; leave it out, or take a method that trains on "
            "tasks (algo=protonet, say)"
        )
    if algorithm.trains_on == "sequences":
        return
    if not shared:
        return
    if drops := drawing(algorithm):
        raise UserError(
            f"hardware.processes={world.size}: {type(drops[0]).__name__} in the network draws for the whole batch of {name} at once, "
            "and each process would have a part of it; use hardware.threads instead"
        )
    if algorithm.backbone.couples_rows:
        raise UserError(
            f"hardware.processes={world.size}: {name} normalises by the statistics of its whole batch, and "
            "each process would have a part of it; use hardware.threads instead, or backbone.norm=group (and backbone.drop_rate=0)"
        )


def without_classes(algorithm: Algorithm) -> str:
    """Says, for a message, why a method has no classes that images could be told to be of."""
    how = "does not define classify" if algorithm.trains_on == "batches" else "trains on episodes"
    return f"{type(algorithm).__name__} {how} and has no classes of its own"


def check_shares(settings: Any, world: World, train: str) -> None:
    """Checks that each of so many processes has a task of every step.

    Args:
        settings: The settings of a training.
        world: The processes.
        train: The key of these settings, for the message of an error.

    Raises:
        UserError: There are fewer tasks.
    """
    if settings.steps > 0 and world.size > max(1, settings.tasks_per_step):
        raise UserError(
            f"hardware.processes={world.size}: processes share the tasks of a step, and {train}.tasks_per_step={settings.tasks_per_step}; "
            f"use at most hardware.processes={max(1, settings.tasks_per_step)}"
        )


def check_labels(algorithm: Algorithm, config: DictConfig, train: str) -> None:
    """Checks that no share of the labels is asked for, and no unlabelled items, where a method trains on batches of all labels.

    Args:
        algorithm: A method on batches.
        config: The whole config.
        train: The key of its training's settings. Of an earlier stage than the run's last, what `train` says matters too.

    Raises:
        UserError: There is such a share, or there are such items.
    """
    keys = [*dict.fromkeys((f"{train}.task", "train.task")), "task"]
    given = {key: OmegaConf.select(config, f"{key}.labelled_share") for key in keys}
    key, share = next(((key, share) for key, share in given.items() if share is not None), ("", 1))
    why = f"is of training tasks, but {type(algorithm).__name__} trains on batches of all labelled images"
    if share < 1:
        raise UserError(
            f"{key}.labelled_share={share:g}: {why}; take a method that trains on tasks (algo=protonet, say), or allow it all labels: "
            f"{train}.task.labelled_share=1"
        )
    if count := OmegaConf.select(config, f"{train}.task.unlabelled"):
        raise UserError(f"{train}.task.unlabelled={count}: {why}; leave it null")


def check_test_task(learner: Trainable, test_task: TaskShape) -> None:
    """Checks that a learner can be validated and tested on such tasks.

    Raises:
        UserError: It cannot.
    """
    check_shape(learner.algorithm, test_task, "test")
    if test_task.query_dirichlet is not None and learner.algorithm.spec.kind == "regression":
        raise UserError("test.task.query_dirichlet: is of classes, but the data are regression tasks; leave it null")
    if learner.task and learner.algorithm.fixed_ways and test_task.ways != (ways := learner.task.ways):
        raise UserError(
            f"test.task.ways={test_task.ways}: {type(learner.algorithm).__name__}'s head has the {ways} outputs that it is "
            f"trained with; use test.task.ways={ways}, or train with train.task.ways={test_task.ways}"
        )
    check_statistics(learner.algorithm, test_task, training=False)


def check_train_task(learner: Trainable, train_task: TaskShape, test_task: TaskShape) -> None:
    """Checks that a learner can be trained on such tasks.

    Args:
        learner: The learner.
        train_task: The shapes of its training tasks.
        test_task: The shapes of validation and test tasks.

    Raises:
        UserError: It cannot.
    """
    algorithm, train = learner.algorithm, learner.key
    name = type(algorithm).__name__
    check_shape(algorithm, train_task, train)
    if algorithm.needs_queries and least(train_task.queries) < 1:
        raise UserError(
            f"{train}.task.queries={count_text(train_task.queries)}: {name} learns from the queries; it needs at least 1"
        )
    for part, key in ((algorithm, "algo"), (learner.wrapper, "wrapper")):
        if train_task.varies and part is not None and part.couples_tasks:
            raise UserError(
                f"{train}.task: its ranges make tasks of several shapes, and {type(part).__name__} ({key}) learns from all tasks "
                f"of a step at once, as tasks of one shape; give numbers for {train}.task.ways, shots and queries"
            )
    if learner.wrapper is not None:
        learner.wrapper.check_tasks(train_task, test_task)
    if learner.settings.steps:
        check_statistics(algorithm, train_task, training=True)


def check_statistics(algorithm: Algorithm, task: TaskShape | None, *, training: bool) -> None:
    """Checks that no norm is to take its statistics of one value, by a blank task of which a set has one row, or by one blank image.

    Of a range of sizes the largest counts: the data may have no task of the others.

    Args:
        algorithm: The method, which is left as it is.
        task: The shape of the tasks; None for steps of one image.
        training: Whether it is trained on them; otherwise it predicts.

    Raises:
        UserError: One is.
    """
    if algorithm.backbone.norm not in (*batch_norm.OF_A_SET, *(["running"] if training else [])):
        return
    spec, device = algorithm.spec, next(algorithm.parameters()).device
    if task is None:
        label = torch.zeros(1, dtype=torch.int64, device=device)
        blank: Any = Batch(torch.zeros(1, *spec.input_shape, device=device), label, label)
    elif task.ways == 1 and 1 in (sizes := (largest(task.shots), largest(task.queries))):
        (x, y), (query_x, query_y) = (
            [torch.zeros(1, rows, *shape, device=device) for shape in (spec.input_shape, (spec.outputs,))]
            for rows in sizes
        )
        blank = Episodes(x, y, query_x, query_y, ways=1)
    else:
        return
    tried = copy.deepcopy(algorithm).train(training)
    with draws.untouched(device):
        tried.loss(blank, 0) if training else tried.predict(blank)


def check_shape(algorithm: Algorithm, task: TaskShape, part: str) -> None:
    """Checks that a method can do tasks of such shapes.

    Args:
        algorithm: The method.
        task: The shapes.
        part: What the key of the tasks begins with: `train` or `test`.

    Raises:
        UserError: It cannot.
    """
    name = type(algorithm).__name__
    if algorithm.fixed_ways and isinstance(task.ways, tuple):
        raise UserError(
            f"{part}.task.ways={count_text(task.ways)}: {name} has one output for each way, so all tasks must have the same "
            f"ways; give one number, or take a method for any ways (algo=protonet or protomaml, say)"
        )
    if algorithm.equal_classes and not task.equal_classes:
        how, value = ("protocol", "uniform") if task.protocol == "meta_dataset" else ("balanced", "true")
        raise UserError(
            f"{part}.task: its classes differ in their numbers of items, and {name} needs equal classes; add task.{how}={value} "
            f"({part}.task.{how}, where that is given), or take another method (algo=protonet, say)"
        )
