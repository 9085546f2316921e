"""What a training stage trains, built from the config: the method on its backbone, its data, optimiser and hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun.backbones.weights import load_backbone
from metarun.config import construct
from metarun.core import Algorithm, Backbone, Batch, Spec, TaskShape
from metarun.data.image_batches import Labelled, batches
from metarun.data.source import DataSource
from metarun.engine import hardware as hardware_module
from metarun.engine.distributed import World
from metarun.engine.hardware import Hardware
from metarun.engine.train import build_optimizer
from metarun.errors import UserError
from metarun.target.target import Target
from metarun.wrappers.base import Wrapper

Sampler = Callable[[int, int], Any]  # the `Episodes` or the `Batch` from `start` to `stop`


@dataclass
class Learner:
    """A method, and what its training takes."""

    name: str  # of its stage
    algorithm: Algorithm
    settings: Any  # the config's `train`, or `pretrain.train`
    hardware: Hardware
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    wrapper: Wrapper | None = None  # whose loss is trained on in place of the method's
    sampler: Sampler | None = None  # of labelled images; None where it trains on episodes
    held_out: Labelled | None = None  # images to validate on; None: episodes of the validation classes


def build_learner(
    config: DictConfig,
    data: DataSource,
    train_task: TaskShape,
    world: World,
    target: Target | None = None,
    validation: Sampler | None = None,
    prefix: str = "",
) -> Learner:
    """The learner of the config's `algo` and `train`, or of those below `prefix` (`pretrain.`).

    `validation` yields the validation episodes to the wrapper. Raises `UserError` where the parts do not
    go together.
    """
    settings = OmegaConf.select(config, f"{prefix}train")
    algorithm = build_algorithm(config, data, train_task, target, prefix)
    trains = config.recipe.source and not config.checkpoint
    if trains:
        check_training(config, algorithm, settings, world, prefix)
    wrapper: Wrapper | None = None
    if config.wrapper and not prefix:
        wrapper = construct(config.wrapper, "wrapper", method=algorithm, validation=validation)
    hardware = hardware_module.choose(config.hardware, algorithm, world, wrapper)
    hardware.place(algorithm)
    if wrapper is not None:
        wrapper.to(hardware.device)
    learner = Learner(
        prefix.rstrip(".") or "train",
        algorithm,
        settings,
        hardware,
        *build_optimizer(wrapper or algorithm, settings),
        wrapper,
    )
    if trains and algorithm.trains_on == "batches":
        seen = algorithm.uses_target != "no"
        if seen and target is None:
            raise UserError(
                f"{prefix}algo: {type(algorithm).__name__} trains on a target's {algorithm.uses_target} too; "
                "use recipe=domain_adaptation target=digits, say"
            )
        images = training_images(data, settings.validate_on)
        labels = algorithm.uses_target == "labels"
        second = target.train if seen and target else None
        learner.sampler = batches(images, config.seed, hardware.device, second, target_labels=labels)
        if settings.validate_on == "images":
            # Held out of what its own classes are: the target's only where it trains on their labels.
            learner.held_out = target.validation if labels and target else data.labelled("val")
    return learner


def check_training(config: DictConfig, algorithm: Algorithm, settings: Any, world: World, prefix: str) -> None:
    """Whether the method can be trained on what it is to be trained on, by so many processes."""
    name = type(algorithm).__name__
    if world.size > settings.tasks_per_step:
        raise UserError(
            f"hardware.processes={world.size}: share the tasks of a step, but {prefix}train.tasks_per_step={settings.tasks_per_step}"
        )
    if algorithm.trains_on == "episodes":
        if settings.validate_on == "images":
            raise UserError(
                f"{prefix}train.validate_on=images: {name} trains on episodes and has no classes of its own; "
                f"use {prefix}train.validate_on=episodes"
            )
        return
    for key, asked in {
        "wrapper": config.wrapper and not prefix,
        f"{prefix}train.noise.tasks": settings.noise.tasks,
    }.items():
        if asked:
            raise UserError(f"{key}: is of training tasks, but {name} trains on batches of images")
    if world.size > 1 and algorithm.backbone.couples_rows:
        raise UserError(
            f"hardware.processes={world.size}: {name} normalises by the statistics of its whole batch, which "
            "no process would have; use hardware.threads instead, or backbone.norm=group (and backbone.drop_rate=0)"
        )


def build_algorithm(
    config: DictConfig, data: DataSource, train_task: TaskShape, target: Target | None = None, prefix: str = ""
) -> Algorithm:
    """The untrained method on its backbone, its weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config, data.input_shape)
    settings = OmegaConf.select(config, f"{prefix}algo")
    if data.outputs is not None:
        outputs = data.outputs
    elif getattr(get_class(settings._target_), "trains_on", "episodes") == "batches":
        outputs = len(training_images(data, OmegaConf.select(config, f"{prefix}train.validate_on")).names)
    else:
        outputs = train_task.ways
    spec = Spec(data.input_shape, data.kind, outputs, len(target.names) if target else None, train_task.shots)
    algorithm: Algorithm = construct(settings, f"{prefix}algo", backbone=backbone, spec=spec)
    return algorithm


def build_backbone(config: DictConfig, input_shape: tuple[int, ...]) -> Backbone:
    """The backbone, with the weights of an earlier run where `backbone.from` names one."""
    node = OmegaConf.masked_copy(config.backbone, [key for key in config.backbone if key != "from"])
    backbone: Backbone = construct(node, "backbone", input_shape=input_shape)
    if config.backbone.get("from"):
        load_backbone(backbone, Path(config.backbone["from"]))
    return backbone


def training_images(data: DataSource, validate_on: str) -> Labelled:
    """What a method on batches trains on: the images of the training classes, or the training images of all classes."""
    return data.labelled("train") if validate_on == "images" else data.labelled(None, "train")


def check_tasks(algorithm: Algorithm, train_task: TaskShape, test_task: TaskShape) -> None:
    """Whether the method can be trained and tested on such tasks."""
    name = type(algorithm).__name__
    if algorithm.fixed_ways and test_task.ways != train_task.ways:
        raise UserError(
            f"test.task.ways={test_task.ways}: {name}'s head has the {train_task.ways} outputs that it is trained with; "
            f"use test.task.ways={train_task.ways}, or train with train.task.ways={test_task.ways}"
        )
    if algorithm.trains_on == "episodes" and algorithm.needs_queries and train_task.queries < 1:
        raise UserError(f"train.task.queries={train_task.queries}: {name} learns from the queries; it needs at least 1")


def augmented(
    sampler: Sampler, augment: Callable[[torch.Tensor], torch.Tensor], seed: int, hardware: Hardware
) -> Sampler:
    """`sampler` with `augment` of its images, which draws from the global generator: seeded anew for every call."""

    def changed(start: int, stop: int) -> Any:
        batch = sampler(start, stop)
        hardware.seed((seed * 2_000_003 + start) % 2**63)
        names = ["x"] if isinstance(batch, Batch) else ["support_x", "query_x"]
        return replace(batch, **{name: change(getattr(batch, name)) for name in names})

    def change(x: torch.Tensor) -> torch.Tensor:
        return augment(x.flatten(0, -4)).view_as(x)

    return changed
