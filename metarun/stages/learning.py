"""What a training stage trains, built from the config: the method on its backbone, its data, optimiser and hardware."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metarun.backbones.weights import load_backbone
from metarun.config import construct, task_of
from metarun.config.values import without
from metarun.core import Algorithm, Backbone, Spec, TaskShape, largest
from metarun.data.origin import Origin
from metarun.data.sequences import sequences
from metarun.data.source import DataSource, Split
from metarun.engine import hardware as hardware_module
from metarun.engine import origins
from metarun.engine.augmentation import augmented
from metarun.engine.learner import Trainable, build_optimizer
from metarun.errors import UserError
from metarun.runs import seen
from metarun.runs.run import Run
from metarun.stages.compatibility import check_labels, check_statistics, check_training
from metarun.stages.training_data import image_batches, sequence_images, training_episodes, training_images
from metarun.target.target import Target
from metarun.wrappers.base import Wrapper

log = logging.getLogger("metarun")


def build_learner(
    run: Run,
    name: str,
    algo: str,
    train: str,
    wrapper_key: str | None = None,
    *,
    trains: bool = False,
    network: DictConfig | None = None,
) -> Trainable:
    """Builds a learner from the config.

    Args:
        run: The run.
        name: The name of the stage that the learner is of.
        algo: The key of the method in the config, such as `algo` or `pretrain.algo`.
        train: The key of its training's settings, such as `train`.
        wrapper_key: The key of what goes around the method while it is trained; None for nothing.
        trains: Whether the stage trains it.
        network: What builds its backbone, where the weights that the config's brings are not wanted; None for the config's.

    Raises:
        UserError: The parts do not go together.
    """
    config = run.config
    settings, task = OmegaConf.select(config, train), task_of(config, train)

    def untrained(source: DictConfig) -> Algorithm:
        return build_algorithm(source, run.data, task, run.target, algo, train, run.training_split)

    brought, bare = (origins_of(run), config) if network is None else (list(run.data.origins), config.copy())
    if network is not None:
        OmegaConf.update(bare, "backbone", network, merge=False)
    algorithm = untrained(bare)
    wrapper = build_wrapper(run, wrapper_key, algorithm, trains)

    def fresh(seed: int | None = None) -> Algorithm:
        own = config.copy()
        own.seed = config.seed if seed is None else seed
        return prepared_by(wrapper, untrained(own))

    prepared_by(wrapper, algorithm)
    if settings.steps and not trains_at_all(run, algorithm, settings, train):
        settings = OmegaConf.merge(settings, {"steps": 0})
    if trains:
        check_training(algorithm, settings, run.world, train, wrapper_key if wrapper and wrapper.trains else None)
        if wrapper is not None and settings.steps:
            wrapper.check(settings.tasks_per_step)
    hardware = hardware_module.choose(config.hardware, algorithm, run.world, wrapper)
    hardware.place(algorithm)
    if wrapper is not None:
        wrapper.to(hardware.device)
    learner = Trainable(
        name,
        algorithm,
        settings,
        config.seed,
        hardware,
        *build_optimizer(wrapper or algorithm, settings, train),
        wrapper=wrapper,
        fresh=fresh,
        seen=seen_by(brought),
        origins=with_library(brought, algorithm.backbone),
        built_from=algo,
        key=train,
    )
    if trains:
        give_training_data(run, learner, task)
    elif algorithm.trains_on != "batches":
        learner.task = task
    return learner


def build_wrapper(run: Run, key: str | None, algorithm: Algorithm, trains: bool) -> Wrapper | None:
    """Builds what goes around a method, where the config has it and it has anything to do.

    Args:
        run: The run.
        key: The key of the wrapper in the config; None for nothing.
        algorithm: The method, which the wrapper holds.
        trains: Whether the method is trained; where it is not, a wrapper has to do with it only if it prepares tasks.

    Raises:
        UserError: Its settings do not go with the method.
    """
    node = OmegaConf.select(run.config, key) if key else None
    if not node or not (trains or getattr(get_class(node._target_), "prepares", False)):
        return None
    assert key is not None

    def validation(start: int, stop: int) -> Any:
        return run.episodes("val", run.test_task, run.hardware.device)(start, stop)

    wrapper: Wrapper = construct(node, key, method=algorithm, validation=validation)
    return wrapper


def prepared_by(wrapper: Wrapper | None, algorithm: Algorithm) -> Algorithm:
    """Returns the method, which from now on predicts tasks as the wrapper makes them, where there is one."""
    algorithm.prepare = None if wrapper is None else wrapper.preparation()
    return algorithm


def give_training_data(run: Run, learner: Trainable, task: TaskShape) -> None:
    """Gives a learner what it trains on: batches of images, sequences of them or episodes, changed by `augment` if there is one.

    Args:
        run: The run.
        learner: What is trained; its `sampler`, `task` and `seen` are set.
        task: The shape of its training tasks.

    Raises:
        UserError: The data cannot serve the method.
    """
    split = run.training_split  # of whose classes a method on batches sees images
    algorithm, seed, device = learner.algorithm, run.config.seed, learner.hardware.device
    if algorithm.trains_on != "episodes" and learner.wrapper is not None:  # of episodes `training_episodes` checks it
        learner.wrapper.check_tasks(task, run.test_task)
    if algorithm.trains_on == "batches":
        if learner.settings.steps:
            check_labels(algorithm, run.config, learner.key)
            if learner.settings.tasks_per_step == 1:
                check_statistics(algorithm, None, training=True)
        learner.sampler = image_batches(run, learner, split)
    else:
        learner.task = task
        if algorithm.trains_on == "sequences":
            images = sequence_images(run.data, task)
            learner.sampler = sequences(images, task, algorithm.remembered, seed, device, f"{learner.key}.task")
        else:
            learner.sampler = training_episodes(run, learner)
    learner.seen = seen.merged(learner.seen, seen.classes(run.data, split if learner.task is None else "train"))
    if (augment := run.augment_of(run.data)) is not None:
        learner.sampler = augmented(learner.sampler, augment, seed, learner.hardware, learner.settings.tasks_per_step)


def trains_at_all(run: Run, algorithm: Algorithm, settings: DictConfig, train: str) -> bool:
    """Whether a training has time, and anything to train that the run uses; what it lacks is logged.

    Args:
        run: The run.
        algorithm: The method.
        settings: Its training's settings.
        train: The key of these settings.
    """
    if run.config.encoder and not trains_what_is_used(run, algorithm):
        log.info(
            "%s: the vectors of the encoder leave nothing to train that a later stage uses; they stay as they are",
            train,
        )
        return False
    return bool(settings.max_seconds != 0)


def trains_what_is_used(run: Run, algorithm: Algorithm) -> bool:
    """Whether training a method moves anything that a stage of the run uses afterwards.

    Of a method on batches that is the backbone, unless a stage asks for the classes that it was trained with, or trains on.
    """
    trained: nn.Module = algorithm
    if algorithm.trains_on == "batches" and not any(stage.asks_for_classes for stage in run.stages):
        later = [stage for stage in run.stages if not stage.gives_weights]
        trained = algorithm.backbone if later and len(run.stages) == len(later) + 1 else algorithm
    return any(value.requires_grad for value in trained.parameters())


def origins_of(run: Run) -> list[Origin]:
    """Lists where what a learner begins with comes from: the run of `backbone.from`, and the weights that its data are made by.

    Raises:
        UserError: They were trained on images of classes that the run meta-tests on.
    """
    found = list(run.data.origins)
    if origin := run.config.backbone.get("from"):
        found.insert(0, origins.of_run("backbone.from", origin))
    for one in found:
        if any(stage.meta_tests for stage in run.stages):
            seen.refuse_test_classes(one.seen, run.data, one.where)
    return found


def with_library(brought: list[Origin], backbone: Backbone) -> list[Origin]:
    """Adds to origins the library whose weights the backbone brings, where these are of no run."""
    of_library = backbone.pretrained and not any(one.key == "backbone.from" for one in brought)
    if not of_library:
        return brought
    library = {"name": getattr(backbone, "name", type(backbone).__name__), "saw": backbone.saw}
    return [Origin("backbone", library=library), *brought]


def seen_by(begins_with: Iterable[Origin]) -> seen.Seen:
    """Joins what all of these weights were trained on."""
    return functools.reduce(seen.merged, (one.seen for one in begins_with), {})


def told_of(begins_with: Sequence[Origin]) -> dict[str, str]:
    """Gives what `protocol.seen` of `result.json` says of the weights that a learner begins with, each by its setting."""
    return {one.key: one.told for one in begins_with if one.told}


def build_algorithm(
    config: DictConfig,
    data: DataSource,
    train_task: TaskShape,
    target: Target | None = None,
    algo: str = "algo",
    train: str = "train",
    split: Split | None = "train",
) -> Algorithm:
    """Builds the untrained method on its backbone, with weights drawn from the run's seed.

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
        outputs = len(sequence_images(data, train_task).names)
    else:
        outputs = largest(train_task.ways)
    spec = Spec(data.input_shape, data.kind, outputs, len(target.names) if target else None, largest(train_task.shots))
    algorithm: Algorithm = construct(settings, algo, backbone=backbone, spec=spec)
    return algorithm


def build_backbone(config: DictConfig, data: DataSource) -> Backbone:
    """Builds the backbone for the items of a data set, with the weights of an earlier run where `backbone.from` names one.

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
    backbone: Backbone = construct(without(config.backbone, ["from"]), "backbone", input_shape=data.input_shape)
    if config.backbone.get("from"):
        load_backbone(backbone, Path(config.backbone["from"]))
        backbone.pretrained = True
    return backbone


def training_protocol(learner: Trainable) -> dict[str, Any]:
    """Gives what `protocol` of `result.json` says of a learner's training; nothing where there was none."""
    settings, task = learner.settings, learner.task
    if not settings.steps:
        return {}
    batches = {"classes": learner.algorithm.spec.outputs, "images_per_step": settings.tasks_per_step}
    found: dict[str, Any] = {"train": task.describe() if task is not None else batches}
    if settings.noise.tasks:
        found["train_noise"] = OmegaConf.to_container(settings.noise)
    if settings.max_seconds is not None:
        found["budget"] = (
            f"{learner.key}.max_seconds: the clock ends the training, and a learning rate that falls over all steps follows the clock; "
            "two runs of one command may differ, but a run that goes on replays the recorded clock"
        )
    return found
