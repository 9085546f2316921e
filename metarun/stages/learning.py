"""What a training stage trains, built from the config: the method on its backbone, its data, optimiser and hardware."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metarun.backbones.weights import load_backbone
from metarun.config import construct, task_of
from metarun.core import (
    Algorithm,
    Backbone,
    Batch,
    Count,
    Episodes,
    MixedEpisodes,
    Spec,
    TaskShape,
    largest,
    least,
    together,
)
from metarun.data.image_batches import Labelled, batches
from metarun.data.noise import with_noise
from metarun.data.sequences import sequences
from metarun.data.source import DataSource, Split, TableSource
from metarun.encoders import EncodedSource
from metarun.engine import checkpoint
from metarun.engine import hardware as hardware_module
from metarun.engine.distributed import World
from metarun.engine.hardware import Hardware
from metarun.engine.train import Learner, Sampler, build_optimizer
from metarun.errors import UserError
from metarun.runs import seen
from metarun.runs.run import Run
from metarun.target.target import Target
from metarun.wrappers.base import Wrapper

log = logging.getLogger("metarun")


def build_learner(
    run: Run, name: str, algo: str, train: str, wrapper: str | None = None, *, trains: bool = False
) -> Learner:
    """A learner, built from the config.

    Args:
        run: The run.
        name: The name of the stage that the learner is of.
        algo: The key of the method in the config, such as `algo` or `pretrain.algo`.
        train: The key of its training's settings, such as `train`.
        wrapper: The key of what goes around the method while it is trained; None for nothing.
        trains: Whether the stage trains it.

    Raises:
        UserError: The parts do not go together.
    """
    config, data, target = run.config, run.data, run.target
    settings, task = OmegaConf.select(config, train), task_of(config, train)
    split = run.training_split

    def fresh() -> Algorithm:
        found = build_algorithm(config, data, task, target, algo, train, split)
        found.prepare = None if around is None else around.preparation()
        return found

    around: Wrapper | None = None
    brought = seen_before(run)
    algorithm = fresh()
    node = OmegaConf.select(config, wrapper) if wrapper else None
    if node and not (trains or getattr(get_class(node._target_), "prepares", False)):
        node = None
    if node and wrapper:

        def validation(start: int, stop: int) -> Any:
            return run.episodes("val", run.test_task, hardware.device)(start, stop)

        around = construct(node, wrapper, method=algorithm, validation=validation)
        assert around is not None
        algorithm.prepare = around.preparation()
    if trains:
        check_training(config, algorithm, settings, run.world, train, wrapper if around and around.trains else None)
        if around is not None and settings.steps:
            around.check(settings.tasks_per_step)
    if settings.steps and config.encoder and not trains_what_is_used(run, algorithm):
        log.info(
            "%s: the vectors of the encoder leave nothing to train that a later stage uses; they stay as they are",
            train,
        )
        settings = OmegaConf.merge(settings, {"steps": 0})
    if settings.max_seconds == 0:
        settings = OmegaConf.merge(settings, {"steps": 0})
    hardware = hardware_module.choose(config.hardware, algorithm, run.world, around)
    hardware.place(algorithm)
    if around is not None:
        around.to(hardware.device)
    learner = Learner(
        name,
        algorithm,
        settings,
        config.seed,
        hardware,
        *build_optimizer(around or algorithm, settings),
        wrapper=around,
        fresh=fresh,
        seen=brought,
        built_from=algo,
    )
    if trains and algorithm.trains_on == "batches":
        learner.sampler = image_batches(run, learner, algo, split)
    elif trains and algorithm.trains_on == "sequences":
        learner.task = task
        images, count = data.labelled(None, "train"), algorithm.remembered
        learner.sampler = sequences(images, task, count, config.seed, hardware.device, f"{train}.task")
    elif trains:
        learner.task = task
        learner.sampler = training_episodes(run, learner, train)
    if trains:
        learner.seen = seen.merged(learner.seen, seen.classes(data, split if learner.task is None else "train"))
        if run.augment is not None and learner.sampler is not None:
            tasks = settings.tasks_per_step
            learner.sampler = augmented(learner.sampler, run.augment, config.seed, hardware, tasks)
    elif algorithm.trains_on != "batches":
        learner.task = task
    return learner


def trains_what_is_used(run: Run, algorithm: Algorithm) -> bool:
    """Whether training a method moves anything that a stage of the run uses afterwards.

    Of a method on batches that is the backbone, unless a stage asks for the classes that it was trained with, or trains on.
    """
    trained: nn.Module = algorithm
    if algorithm.trains_on == "batches" and not any(stage.asks_for_classes for stage in run.stages):
        later = [stage for stage in run.stages if not stage.gives_weights]
        trained = algorithm.backbone if later and len(run.stages) == len(later) + 1 else algorithm
    return any(value.requires_grad for value in trained.parameters())


def seen_before(run: Run) -> seen.Seen:
    """What the weights of `backbone.from`, or of the encoder, were trained on.

    Raises:
        UserError: These are images of classes that the run meta-tests on.
    """
    known: dict[str, seen.Seen] = {}
    if origin := run.config.backbone.get("from"):
        state = checkpoint.load(checkpoint.weights_file("backbone.from", origin))
        known[f"backbone.from={origin}"] = state.get(seen.KEY, {})
    if isinstance(run.data, EncodedSource):
        known[f"encoder.from={run.config.encoder.get('from')}"] = dict(run.data.encoder.seen)
    for where, classes in known.items():
        if any(stage.meta_tests for stage in run.stages):
            seen.refuse_test_classes(classes, run.data, where)
    return functools.reduce(seen.merged, known.values(), {})


def trained_on(run: Run, tested: Labelled) -> int:
    """How many of the target's images `tested` the source's training has among its own, where both are one data set."""
    data, target = run.data, run.target
    if target is None or not isinstance(data, TableSource) or not isinstance(target.source, TableSource):
        return 0
    own, other = data.table, target.source.table
    if list(own.names) != list(other.names) or not np.array_equal(own.offsets, other.offsets):
        return 0
    rows: set[int] = set()
    for learner in run.learners.values():
        if learner.sampler is not None and learner.settings.steps:
            on_images = learner.task is None and learner.settings.validate_on == "images"
            split = run.training_split if on_images else "train"
            part = training_images(data, "images" if on_images else "episodes", split)
            rows |= set(part.rows.tolist())
    return len(rows & set(tested.rows.tolist()))


def tell_trained_on(run: Run, tested: Labelled) -> dict[str, int]:
    """Warns of such images; the fact for the protocol, empty where there are none."""
    if not (count := trained_on(run, tested)):
        return {}
    log.warning(
        "target: the source's training sees %d of its test images, so that the accuracy says nothing of images not seen before",
        count,
    )
    return {"test_images_trained_on": count}


def image_batches(run: Run, learner: Learner, algo: str, split: Split | None) -> Sampler:
    """Shuffled batches of labelled images: of the source, and of the target where the method trains on it too.

    Args:
        run: The run.
        learner: What is trained on them.
        algo: The key of the method, for the message of an error.
        split: The split of whose classes they are; None for all classes.

    Raises:
        UserError: The method needs a target and there is none, or the target's images are of the source's test classes.
    """
    algorithm, target = learner.algorithm, run.target
    reads = algorithm.uses_target != "no"
    if reads and target is None:
        raise UserError(
            f"{algo}: {type(algorithm).__name__} trains on a target's {algorithm.uses_target} too; "
            "use recipe=domain_adaptation target=digits, say"
        )
    images = training_images(run.data, learner.settings.validate_on, split).with_views()
    second = target.train if reads and target else None
    if reads and target:
        learner.seen = seen.merged(learner.seen, seen.classes(target.source, None))
    labels = algorithm.uses_target == "labels"
    return batches(images, run.config.seed, learner.hardware.device, second, target_labels=labels)


def held_out_images(run: Run, learner: Learner, train: str) -> Labelled | None:
    """The images that a method on batches is validated on: held out of the classes that it trains on.

    Args:
        run: The run.
        learner: What is validated.
        train: The key of its training's settings, for the message of an error.

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
            f"{train}.validate_on=images: the classes have too few images to hold any out for validation; use "
            f"{train}.validate_on=episodes"
        )
    return images


def training_episodes(run: Run, learner: Learner, train: str) -> Sampler:
    """Episodes of the training classes, with the noise that the training's settings ask for."""
    assert learner.task is not None
    check_train_task(learner, learner.task, train)
    noise = learner.settings.noise

    def sampler(task: TaskShape) -> Sampler:
        return run.episodes("train", task, learner.hardware.device)

    if not noise.tasks:
        return sampler(learner.task)
    return with_noise(sampler, learner.task, run.config.seed, noise.tasks, noise.labels)


def build_algorithm(
    config: DictConfig,
    data: DataSource,
    train_task: TaskShape,
    target: Target | None = None,
    algo: str = "algo",
    train: str = "train",
    split: Split | None = "train",
) -> Algorithm:
    """The untrained method on its backbone, its weights drawn from the run's seed.

    Args:
        config: The whole config.
        data: The source.
        train_task: The shape of its training tasks.
        target: The target, for a method that trains on its images too.
        algo: The key of the method in the config.
        train: The key of its training's settings.
        split: The split of whose classes a method on batches sees images; None for all classes.
    """
    torch.manual_seed(config.seed)
    backbone = build_backbone(config, data)
    settings = OmegaConf.select(config, algo)
    if data.outputs is not None:
        outputs = data.outputs
    elif (trains_on := getattr(get_class(settings._target_), "trains_on", "episodes")) == "batches":
        outputs = len(training_images(data, OmegaConf.select(config, train).validate_on, split).names)
    elif trains_on == "sequences":
        outputs = len(data.labelled(None, "train").names)
    else:
        outputs = largest(train_task.ways)
    spec = Spec(data.input_shape, data.kind, outputs, len(target.names) if target else None, largest(train_task.shots))
    algorithm: Algorithm = construct(settings, algo, backbone=backbone, spec=spec)
    return algorithm


def build_backbone(config: DictConfig, data: DataSource) -> Backbone:
    """The backbone for the items of a data set, with the weights of an earlier run where `backbone.from` names one.

    Raises:
        UserError: The items are texts and it does not read them, or the other way round.
    """
    reads_texts = getattr(get_class(config.backbone._target_), "reads_texts", False)
    if data.item == "text" and not reads_texts:
        raise UserError(
            "data: the items are texts, which this backbone does not read; add encoder=minilm or encoder=tfidf, or take "
            "backbone=minilm"
        )
    if reads_texts and data.item != "text":
        raise UserError(
            f"backbone: reads texts, but the items of the data are {data.item}s; take another backbone, or texts without an encoder"
        )
    node = OmegaConf.masked_copy(config.backbone, [key for key in config.backbone if key != "from"])
    backbone: Backbone = construct(node, "backbone", input_shape=data.input_shape)
    if config.backbone.get("from"):
        load_backbone(backbone, Path(config.backbone["from"]))
        backbone.pretrained = True
    return backbone


def training_images(data: DataSource, validate_on: str, split: Split | None) -> Labelled:
    """What a method on batches trains on.

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


def check_training(
    config: DictConfig, algorithm: Algorithm, settings: Any, world: World, train: str, wrapper: str | None
) -> None:
    """Checks that the method can be trained on what it is to be trained on, by so many processes.

    Args:
        config: The whole config.
        algorithm: The method.
        settings: Its training's settings.
        world: The processes.
        train: The key of these settings, for the message of an error.
        wrapper: The key of what goes around the method; None for nothing.
    """
    name = type(algorithm).__name__
    if world.size > settings.tasks_per_step:
        raise UserError(
            f"hardware.processes={world.size}: share the tasks of a step, but {train}.tasks_per_step={settings.tasks_per_step}"
        )
    if algorithm.trains_on != "batches" and settings.validate_on == "images":
        raise UserError(
            f"{train}.validate_on=images: {name} trains on episodes and has no classes of its own; "
            f"use {train}.validate_on=episodes"
        )
    if algorithm.trains_on == "episodes":
        return
    what = "batches" if algorithm.trains_on == "batches" else "sequences"
    for key in filter(None, (wrapper, f"{train}.noise.tasks" if settings.noise.tasks else None)):
        raise UserError(f"{key}: is of training tasks, but {name} trains on {what} of images")
    if algorithm.trains_on == "sequences":
        return
    if world.size > 1 and algorithm.backbone.couples_rows:
        raise UserError(
            f"hardware.processes={world.size}: {name} normalises by the statistics of its whole batch, which "
            "no process would have; use hardware.threads instead, or backbone.norm=group (and backbone.drop_rate=0)"
        )


def check_test_task(learner: Learner, test_task: TaskShape) -> None:
    """Checks that a learner can be validated and tested on such tasks."""
    check_shape(learner.algorithm, test_task, "test")
    if test_task.query_dirichlet is not None and learner.algorithm.spec.kind == "regression":
        raise UserError("test.task.query_dirichlet: is of classes, but the data are regression tasks; leave it null")
    if learner.task and learner.algorithm.fixed_ways and test_task.ways != (ways := learner.task.ways):
        raise UserError(
            f"test.task.ways={test_task.ways}: {type(learner.algorithm).__name__}'s head has the {ways} outputs that it is "
            f"trained with; use test.task.ways={ways}, or train with train.task.ways={test_task.ways}"
        )


def check_train_task(learner: Learner, train_task: TaskShape, train: str) -> None:
    """Checks that a learner can be trained on such tasks; `train` is the key of its training's settings."""
    algorithm = learner.algorithm
    name = type(algorithm).__name__
    check_shape(algorithm, train_task, train)
    if algorithm.needs_queries and least(train_task.queries) < 1:
        raise UserError(
            f"{train}.task.queries={range_text(train_task.queries)}: {name} learns from the queries; it needs at least 1"
        )
    if not train_task.varies:
        return
    for part, key in ((algorithm, "algo"), (learner.wrapper, "wrapper")):
        if part is not None and part.couples_tasks:
            raise UserError(
                f"{train}.task: its ranges make tasks of several shapes, and {type(part).__name__} ({key}) learns from all tasks "
                f"of a step at once, as tasks of one shape; give numbers for {train}.task.ways, shots and queries"
            )
    if learner.wrapper is not None:
        learner.wrapper.check_varied()


def check_shape(algorithm: Algorithm, task: TaskShape, part: str) -> None:
    """Checks that a method can do tasks of such shapes.

    Args:
        algorithm: The method.
        task: The shapes.
        part: What the key of the tasks begins with: `train` or `test`.
    """
    name = type(algorithm).__name__
    if algorithm.fixed_ways and isinstance(task.ways, tuple):
        raise UserError(
            f"{part}.task.ways={range_text(task.ways)}: {name} has one output for each way, so all tasks must have the same "
            f"ways; give one number, or take a method for any ways (algo=protonet or protomaml, say)"
        )
    if algorithm.equal_classes and not task.equal_classes:
        how = "task.protocol=uniform" if task.protocol == "meta_dataset" else "task.balanced=true"
        raise UserError(
            f"{part}.task: its classes differ in their numbers of items, and {name} needs equal classes; add {how}, or take "
            "another method (algo=protonet, say)"
        )


def range_text(count: Count) -> str:
    """A number, or a range as it is typed."""
    return f"[{count[0]},{count[1]}]" if isinstance(count, tuple) else str(count)


def training_protocol(learner: Learner) -> dict[str, Any]:
    """What `protocol` of `result.json` says of a learner's training."""
    settings, task = learner.settings, learner.task
    batches = {"classes": learner.algorithm.spec.outputs, "images_per_step": settings.tasks_per_step}
    found: dict[str, Any] = {"train": task.describe() if task is not None else batches}
    if settings.noise.tasks:
        found["train_noise"] = OmegaConf.to_container(settings.noise)
    if settings.max_seconds is not None and settings.steps:
        found["budget"] = (
            "train.max_seconds: the clock ends the training, and a learning rate that falls over all steps follows the clock; "
            "two runs of one command may differ, but a run that goes on replays the recorded clock"
        )
    return found


def augmented(
    sampler: Sampler,
    augment: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    hardware: Hardware,
    tasks_per_step: int = 1,
) -> Sampler:
    """`sampler` with `augment` of its images, as a function of (seed, step, task).

    `augment` draws from the global generators for all images that it is given. So every process changes the images of the
    whole step, with generators that are seeded by the step, and keeps those of its own tasks.

    Args:
        sampler: Gives the tasks, or the images, from a start to a stop.
        augment: Changes images `[B, C, H, W]`.
        seed: The run's seed.
        hardware: Whose generators are seeded.
        tasks_per_step: The number of tasks (images, for methods on batches) of a step, over all processes.
    """

    def changed(start: int, stop: int) -> Any:
        first = start - start % tasks_per_step
        parts = [part for at in range(first, stop, tasks_per_step) for part in step(at).split(1)]
        parts = parts[start - first : stop - first]
        if isinstance(parts[0], Episodes):
            return together(parts)
        return Batch(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(Batch)))

    def step(first: int) -> Any:
        batch = sampler(first, first + tasks_per_step)
        hardware.seed((seed * 2_000_003 + first) % 2**63)
        if isinstance(batch, MixedEpisodes):
            return replace(batch, groups=tuple(map(items, batch.groups)))
        return items(batch)

    def items(batch: Any) -> Any:
        found = {name: getattr(batch, name, None) for name in ("x", "support_x", "query_x", "unlabelled_x")}
        return replace(batch, **{name: change(x) for name, x in found.items() if x is not None})

    def change(x: torch.Tensor) -> torch.Tensor:
        return augment(x.flatten(0, -4)).view_as(x)

    return changed
