"""What is trained: a method with everything that its training takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from metarun.config import construct
from metarun.config.ranges import shown
from metarun.core import Algorithm, TaskShape
from metarun.data.origin import Origin
from metarun.engine.hardware import Hardware
from metarun.errors import UserError, first_line

if TYPE_CHECKING:
    from metarun.wrappers.base import Wrapper

Sampler = Callable[[int, int], Any]  # the `Episodes` or the `Batch` from `start` to `stop`, on the device


def build_optimizer(
    algorithm: Algorithm | Wrapper, settings: Any, key: str = "train"
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Builds the optimiser of the trainable parameters and its learning-rate schedule, from the config's `train`.

    Args:
        algorithm: What is trained.
        settings: The settings of the training.
        key: Where they lie in the config, for messages.

    Raises:
        UserError: There are steps but nothing to train, a setting is wrong, or the training loop could not take its steps.
    """
    parameters = [value for value in algorithm.parameters() if value.requires_grad]
    if not parameters:
        if settings.steps:
            raise UserError(
                f"{key}.steps={settings.steps}: there is nothing to train in {type(algorithm).__name__} on this backbone; "
                f"use {key}.steps=0"
            )
        parameters = [torch.nn.Parameter(torch.zeros(()))]  # an optimiser takes no empty list
    optimizer = construct(settings.optimizer, f"{key}.optimizer", params=parameters)
    schedule = construct(settings.schedule, f"{key}.schedule", optimizer=optimizer)
    of_torch = type(schedule).__module__.startswith("torch.")  # none of whose schedules looks at its numbers
    for name, value in settings.schedule.items() if of_torch else ():
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"{key}.schedule.{name}={shown(value)}: must be at least 0")
    if settings.steps:
        _try_out(settings, key, parameters[0])
    if (total := getattr(schedule, "total_steps", settings.steps)) < settings.steps:
        raise UserError(
            f"{key}.schedule.total_steps={total}: {type(schedule).__name__} takes no further step than that, and "
            f"{key}.steps={settings.steps}; give it as many"
        )
    return optimizer, schedule


def _try_out(settings: Any, key: str, like: torch.Tensor) -> None:
    """Takes one step, as the training loop does, on a parameter of its own that is of the kind of `like`."""
    parameter = torch.nn.Parameter(like.new_zeros(2, 2))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = construct(settings.optimizer, f"{key}.optimizer", params=[parameter])
    schedule = construct(settings.schedule, f"{key}.schedule", optimizer=optimizer)
    for name, part, known in (("optimizer", optimizer, "Adam"), ("schedule", schedule, "CosineAnnealingLR")):
        try:
            part.step()
        except Exception as error:
            raise UserError(
                f"{key}.{name}: the training loop cannot drive {type(part).__name__}, whose step() must need nothing but the gradients "
                f"({first_line(error)}); take another, such as {known}"
            ) from error


@dataclass
class Trainable:
    """A method with everything that its training takes.

    Attributes:
        name: The name of the stage that trains it.
        algorithm: The method on its backbone.
        settings: The config's `train`, or that of an earlier stage.
        seed: The seed of the run.
        hardware: Where it is trained; the builder replaces it once all ranks have met.
        optimizer: The optimiser of the trainable parameters; None for a learner that is not trained.
        schedule: The schedule of the optimiser's learning rate.
        sampler: The `Episodes` or the `Batch` from `start` to `stop`.
        task: The shape of its training tasks; None where it trains on batches of images, or not at all.
        wrapper: Has the loss that is trained on in place of the method's; None for the method's own.
        fresh: Builds the same method anew, with the weights that it had before any training; a loaded one knows by which seed.
        seen: The images that it was trained on, which a checkpoint keeps (see `metarun.runs.seen`).
        origins: Where what it begins with comes from: the weights of its backbone, those of an encoder.
        selected_by: The rule that chose its weights, for `result.json`.
        built_from: The key of its method in the config; None for a backbone without a method.
        key: The key of `settings` in the config.
        made_by: A digest of all that its training depends on, by which its checkpoints are known; None where nobody asks.
    """

    name: str
    algorithm: Algorithm
    settings: Any
    seed: int
    hardware: Hardware
    optimizer: torch.optim.Optimizer | None = None
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    sampler: Sampler | None = None
    task: TaskShape | None = None
    wrapper: Wrapper | None = None
    fresh: Callable[..., Algorithm] | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    origins: Sequence[Origin] = ()
    selected_by: str = ""
    built_from: str | None = None
    key: str = "train"
    made_by: str | None = None
